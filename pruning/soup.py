"""Sparse model soups: which candidates of one parent go into the average, and how much of each.

Prune once, train m copies that differ in one factor, average them (`mean`): the average has the parent's masks and is
the next phase's parent.

Zimmer et al., "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging", ICLR 2024. Greedy and uniform
soups: Wortsman et al., "Model soups", ICML 2022; there a candidate is taken at an equal score, here only when the gain
exceeds the noise of the held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError, TrainingError

NOISE_MARGIN = 1.0


@dataclass(frozen=True)
class Soup:
    """How much of each candidate goes in (`weights`, sum 1), and the held-out loss of each sequence, float64 [n]."""

    weights: tuple[float, ...]
    losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


def uniform_weights(members: Iterable[int], count: int) -> tuple[float, ...]:
    """1 / k for each of the k members, 0 for the other candidates."""
    chosen = set(members)
    return tuple(1 / len(chosen) if index in chosen else 0.0 for index in range(count))


def normalised(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """`weights` over their sum. RecipeError unless there are `count`, none negative and their sum above 0, finite."""
    if len(weights) != count:
        raise RecipeError(f"{len(weights)} weights for {count} models", hint="give one weight for each model")
    total = sum(weights)
    if any(not 0 <= weight < math.inf for weight in weights) or not 0 < total < math.inf:
        came = ", ".join(f"{weight:g}" for weight in weights)
        raise RecipeError(
            f"weights must not be negative, and their sum must be above 0 and finite, got {came}",
            hint="0.5,0.25,0.25 for example",
        )
    return tuple(weight / total for weight in weights)


def check_margin(margin: float) -> None:
    """RecipeError unless it is a finite number of standard errors, 0 included."""
    if not 0 <= margin < math.inf:
        raise RecipeError(
            f"margin must be at least 0 and finite, got {margin:g}", hint="1 is usual, 0 takes every gain"
        )


def noise(difference: Tensor) -> float:
    """Standard error of the mean of paired per-sequence differences; infinite for fewer than two."""
    n = difference.numel()
    return float(difference.double().std(correction=1)) / math.sqrt(n) if n > 1 else math.inf


def better(new: Tensor, old: Tensor, margin: float) -> bool:
    """Whether the mean loss fell by more than `margin` standard errors of the paired differences."""
    gain = old.double() - new.double()
    if margin == 0:
        return float(gain.mean()) > 0
    return float(gain.mean()) > margin * noise(gain)


def greedy(
    candidates: Sequence[Tensor],
    evaluate: Callable[[tuple[float, ...]], Tensor],
    margin: float = NOISE_MARGIN,
) -> Soup:
    """Start from the best candidate; take each next best one in if the average gets better by more than the noise.

    Args:
        candidates: held-out losses per sequence, [n] each, of the same sequences.
        evaluate: the losses of the soup with these weights.
        margin: in standard errors of the paired differences; 0 takes every gain.
    """
    order = sorted(range(len(candidates)), key=lambda index: (float(candidates[index].double().mean()), index))
    members = order[:1]
    found = Soup(uniform_weights(members, len(candidates)), candidates[order[0]].double())
    for index in order[1:]:
        weights = uniform_weights([*members, index], len(candidates))
        losses = evaluate(weights).double()
        if better(losses, found.losses, margin):
            members.append(index)
            found = Soup(weights, losses)
    return found


def learn_weights(
    count: int,
    gradient: Callable[[tuple[float, ...]], tuple[float, Sequence[float]]],
    steps: int = 10,
    rate: float = 1.0,
) -> tuple[float, ...]:
    """Weights on the simplex by exponentiated gradient descent, from the uniform soup; the best that were seen.

    w_i <- w_i exp(-rate g_i / max |g|), normalised: the step does not depend on the scale of the gradient. With
    theta = sum w_i theta_i, g_i = <dL / d theta, theta_i>, so one candidate in memory at a time is enough.

    Args:
        count: number of candidates.
        gradient: weights -> (held-out loss, d loss / d w).
        steps: evaluations of `gradient`.
        rate: halved whenever the loss did not fall.
    """
    weights = uniform_weights(range(count), count)
    best, best_loss, best_slope = weights, math.inf, [0.0] * count
    for _ in range(steps):
        loss, slope = gradient(weights)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of a soup is {loss}", hint="use --set soup=uniform, or soup=greedy")
        if loss < best_loss:
            middle = sum(slope) / count  # a shift common to all cancels in the normalisation
            best, best_loss, best_slope = weights, loss, [value - middle for value in slope]
        else:
            rate /= 2
        scale = max(map(abs, best_slope)) or 1.0
        raw = [w * math.exp(-rate * g / scale) for w, g in zip(best, best_slope, strict=True)]
        weights = tuple(value / sum(raw) for value in raw)
    return best


def ensemble_losses(log_probabilities: Tensor) -> Tensor:
    """Loss of the prediction ensemble, the mean of the candidates' probabilities.

    log_probabilities: of the true token, [candidates, ...]. Returns -log(mean over candidates of p), [...].
    """
    count = log_probabilities.shape[0]
    return math.log(count) - torch.logsumexp(log_probabilities.double(), dim=0)


def check_count(candidates: int, ranks: int = 1) -> None:
    """RecipeError for fewer than two candidates, or for rank groups that would have none."""
    if candidates < 2:
        raise RecipeError(f"a soup needs at least 2 candidates, got {candidates}", hint="three to five are usual")
    if ranks > candidates:
        raise RecipeError(
            f"{ranks} processes were started for {candidates} candidates: each trains one at a time",
            hint=f"start at most {candidates} processes, or train more candidates with --set candidates=...",
        )
