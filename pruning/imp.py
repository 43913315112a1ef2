"""Iterative magnitude pruning: P phases, each of which prunes a part of what is left and trains the rest.

With s the final sparsity, s_0 what is pruned already and P phases, every phase prunes the same part of what remains,
q = 1 - ((1 - s) / (1 - s_0))^(1/P), so that s_p = 1 - (1 - s_0) (1 - q)^p. Masks may only shrink, counts are
exact (selection by rank), and training comes in as a callable.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015; phases as in Zimmer et
al., "How I Learned to Stop Worrying and Love Retraining", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ModelError, RecipeError
from .allocation import global_counts
from .mask import Mask
from .pattern import NM, Block, Pattern, Unstructured
from .selection import keep_all_but

MIXED = "mixed"  # the pattern of a mask that has none

M = TypeVar("M")
Score = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Phase:
    """One phase: `number` of `of`, from 1, and the pattern that holds at its end."""

    number: int
    of: int
    pattern: Pattern


def phase_rate(sparsity: float, phases: int, before: float = 0.0) -> float:
    """q, the fraction of the remaining weights that every phase prunes. RecipeError for a target below `before`."""
    if phases < 1:
        raise RecipeError(f"phases must be at least 1, got {phases}", hint="three are usual")
    if sparsity < before:
        raise RecipeError(
            f"the target sparsity {sparsity:g} is below the {before:g} that is pruned already",
            hint="masks may only shrink: give a higher sparsity",
        )
    return 0.0 if sparsity == before else 1 - ((1 - sparsity) / (1 - before)) ** (1 / phases)


def phase_sparsity(sparsity: float, phases: int, phase: int, before: float = 0.0) -> float:
    """s_p after `phase` phases, in [before, sparsity]; `sparsity` itself after the last one."""
    if phase == phases:
        return sparsity
    return 1 - (1 - before) * (1 - phase_rate(sparsity, phases, before)) ** phase


def phase_patterns(final: Pattern, phases: int, before: float = 0.0) -> list[Pattern]:
    """The pattern after each phase; the last one is `final`.

    Unstructured: s_p, with the scope of `final`. Block: the same blocks with s_p. N:M: the same M, with round(M (1 -
    s_p)) kept but never fewer than N, so 1:8 in three phases is 4:8, 2:8, 1:8. A phase may prune nothing where M is
    small: 2:4 in three phases is 3:4, 3:4, 2:4.
    """
    phase_rate(final.sparsity, phases, before)
    return [
        _at(final, phase_sparsity(final.sparsity, phases, phase, before), phase == phases)
        for phase in range(1, phases + 1)
    ]


def _at(final: Pattern, sparsity: float, last: bool) -> Pattern:
    if last:
        return final
    if isinstance(final, NM):
        return NM(max(final.keep, round(final.group * (1 - sparsity))), final.group)
    if isinstance(final, Block):
        return Block(final.rows, final.cols, sparsity)
    return Unstructured(sparsity, final.scope)


def magnitude(name: str, weight: Tensor) -> Tensor:
    """|w| in float32; compares across matrices."""
    return weight.detach().to(torch.float32).abs()


def tighten(
    weights: Mapping[str, Tensor], masks: Mapping[str, Mask], pattern: Pattern, score: Score = magnitude
) -> dict[str, Mask]:
    """The masks of the next phase: inside `masks`, the lowest scores gone. No weight changes.

    Under scope "row", "matrix" and "model" (all of `weights` compared), and for N:M and blocks, exactly
    `pattern.zeros(...)` entries are pruned, of the whole model under scope "model". Where `masks` have pruned more of a
    matrix (row, group, block) than the pattern asks for, it stays as it is: nothing comes back. Among equal scores the
    lower index is kept; under scope "model" the matrix that comes first.

    Args:
        weights: name -> [out, in], any float dtype, one after another in a fixed order.
        masks: name -> the mask so far; a matrix without one is dense.
        pattern: must fit every shape.
        score: (name, weight) -> float32 [out, in], not negative.

    Raises:
        ModelError: a score that is NaN, negative or infinite.
        RecipeError: the pattern does not fit a shape.
    """
    for name, weight in weights.items():
        pattern.check(*weight.shape, name)
    if isinstance(pattern, Unstructured) and pattern.scope == "model":
        return _over_the_model(weights, masks, pattern, score)
    found = {}
    for name, weight in weights.items():
        scores = _scores(score, name, weight)
        kept = _kept(masks, name, weight)
        found[name] = _promising(pattern.mask(_below(scores, kept, pattern)) & kept, pattern)
    return found


def _over_the_model(
    weights: Mapping[str, Tensor], masks: Mapping[str, Mask], pattern: Unstructured, score: Score
) -> dict[str, Mask]:
    def remaining() -> Iterable[Tensor]:
        for name, weight in weights.items():
            yield _scores(score, name, weight)[_kept(masks, name, weight)]

    sizes = {name: weight.numel() for name, weight in weights.items()}
    gone = {name: masks[name].zeros if name in masks else 0 for name in weights}
    more = max(0, round(pattern.sparsity * sum(sizes.values())) - sum(gone.values()))
    counts = global_counts(remaining, more)
    found = {}
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        kept = _kept(masks, name, weight)
        scores = _scores(score, name, weight).masked_fill(~kept, -1.0)
        found[name] = _promising(keep_all_but(scores, gone[name] + count) & kept, pattern)
    return found


def _promising(keep: Tensor, pattern: Pattern) -> Mask:
    """The mask under the pattern that it really has: earlier masks may have pruned more than `pattern` asks for."""
    rows, cols = keep.shape
    zeros = rows * cols - int(keep.sum())
    if isinstance(pattern, Unstructured) and (pattern.scope == "model" or zeros != pattern.zeros(rows, cols)):
        return Mask.from_bool(keep, str(Unstructured.for_count(zeros, rows, cols)))
    shrunk = isinstance(pattern, Block) and zeros != pattern.zeros(rows, cols)
    return Mask.from_bool(keep, MIXED if shrunk else str(pattern))


def _below(scores: Tensor, kept: Tensor, pattern: Pattern) -> Tensor:
    """Scores with what is pruned already below everything that is kept, a kept 0.0 included."""
    if not isinstance(pattern, Block):
        return scores.masked_fill(~kept, -1.0)
    rows, cols = scores.shape
    tiles = kept.reshape(rows // pattern.rows, pattern.rows, cols // pattern.cols, pattern.cols)
    empty = ~tiles.any(dim=3, keepdim=True).any(dim=1, keepdim=True).expand(tiles.shape).reshape(rows, cols)
    return scores.masked_fill(~kept, 0.0).masked_fill(empty, -1.0)


def _scores(score: Score, name: str, weight: Tensor) -> Tensor:
    scores = score(name, weight)
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        raise ModelError(
            f"{name}: scores must be finite and not negative", hint="the weights hold NaN or infinite values"
        )
    return scores


def _kept(masks: Mapping[str, Mask], name: str, weight: Tensor) -> Tensor:
    if name not in masks:
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    return masks[name].to_bool().to(weight.device)


def run_phases(
    model: M,
    patterns: list[Pattern],
    prune: Callable[[M, Phase], None],
    retrain: Callable[[M, Phase], dict[str, Any]],
    *,
    first: int = 1,
) -> Iterator[tuple[Phase, dict[str, Any]]]:
    """Prune and retrain, phase after phase; after each (phase, metrics), when the caller may save.

    Args:
        model: handed on as it is, changed in place by both callables.
        patterns: one per phase, from `phase_patterns`.
        prune: sets the masks that hold at the end of the phase.
        retrain: trains under them with a fresh optimizer; a soup trains its candidates and leaves their average.
        first: the phase to begin with, when the earlier ones were done before.
    """
    for number in range(first, len(patterns) + 1):
        phase = Phase(number, len(patterns), patterns[number - 1])
        prune(model, phase)
        yield phase, retrain(model, phase)
