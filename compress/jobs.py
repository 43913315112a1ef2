"""Which matrices of a model a stage prunes, and to which pattern; found from names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import GossamerError, RecipeError
from ..pruning.pattern import Pattern
from .blocks import Prunable, StreamedModel


class Selection(Protocol):
    """The fields of a stage that say which matrices it prunes."""

    @property
    def include(self) -> tuple[str, ...]: ...

    @property
    def exclude(self) -> tuple[str, ...]: ...

    @property
    def untie(self) -> bool: ...


@dataclass(frozen=True)
class MatrixJob:
    """One matrix to prune. `keys`: the checkpoint tensors that hold it."""

    prunable: Prunable
    pattern: Pattern
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.prunable.name

    @property
    def zeros(self) -> int:
        return self.pattern.zeros(*self.prunable.shape)

    @property
    def size(self) -> int:
        return self.prunable.shape[0] * self.prunable.shape[1]


def matrix_jobs(pattern: Pattern, chosen: Sequence[Prunable], model: StreamedModel) -> tuple[MatrixJob, ...]:
    """A job for every chosen matrix. RecipeError when the pattern does not fit one, or when none is left."""
    check_shapes(pattern, list(chosen))
    if not chosen:
        raise RecipeError(
            "nothing is left to prune", hint="check --include and --exclude; `gossamer inspect` lists names"
        )
    return tuple(MatrixJob(prunable, pattern, tuple(model.source_keys(prunable))) for prunable in chosen)


def left_out(model: StreamedModel, excluded: Iterable[Prunable]) -> tuple[tuple[str, str], ...]:
    """(name, reason) of every matrix of the blocks that is not pruned."""
    skipped = [pair for i in range(model.num_blocks) for pair in model.unprunable(i)]
    return tuple(skipped + [(prunable.name, "excluded") for prunable in excluded])


def select(stage: Selection, model: StreamedModel) -> tuple[list[Prunable], list[Prunable]]:
    """(matrices to prune, matrices left out by include/exclude).

    `include` patterns that match matrices inside the blocks keep only those; a pattern that matches the head alone adds
    the head. RecipeError for a pattern that matches nothing, or for a head that shares the embedding's weight.
    """
    inside = [prunable for i in range(model.num_blocks) for prunable in model.prunables(i)]
    head = model.head()
    names = [prunable.name for prunable in inside]
    for option, patterns in (("--include", stage.include), ("--exclude", stage.exclude)):
        for pattern in patterns:
            candidates = [*names, *([head.name] if head else [])]
            if not any(re.search(pattern, name) for name in candidates):
                raise RecipeError(f"{option} {pattern!r} matches no matrix", hint=f"names look like {_examples(names)}")
    filters = [pattern for pattern in stage.include if any(re.search(pattern, name) for name in names)]
    wanted = [p for p in inside if not filters or _matches(p.name, filters)]
    if head is not None and _matches(head.name, stage.include) and not _matches(head.name, filters):
        if model.head_is_tied and not stage.untie:
            can = "untie" in getattr(type(stage), "model_fields", {})
            raise RecipeError(
                f"{head.name} shares its weight with the input embedding, which is never pruned",
                hint="add --untie to give the head a weight of its own"
                if can
                else "prune matrices of the blocks alone",
            )
        wanted.append(head)
    kept = [p for p in wanted if not _matches(p.name, stage.exclude)]
    names_kept = {p.name for p in kept}
    return kept, [p for p in inside if p.name not in names_kept]


def check_shapes(pattern: Pattern, chosen: list[Prunable]) -> None:
    """RecipeError, one for all, unless the pattern fits every matrix."""
    unfit = {prunable.name: _misfit(pattern, *prunable.shape, prunable.name) for prunable in chosen}
    errors = {name: error for name, error in unfit.items() if error is not None}
    if not errors:
        return
    first = next(iter(errors.values()))
    if len(errors) == 1:
        raise first
    shapes = [prunable.shape for prunable in chosen if prunable.name in errors]
    rows, cols = (math.gcd(*sizes) for sizes in zip(*shapes, strict=True))
    common = _misfit(pattern, rows, cols, "all of them")  # what divides the common divisor divides every one
    advice = ((common and common.hint) or "").partition(", or ")[2]
    kinds = list(dict.fromkeys(_kind(name) for name in errors))
    message = f"{first.message}; the same with {len(errors) - 1} more of {len(chosen)} matrices"
    if len(errors) < len(chosen):
        advice = f"leave them out with --exclude '({'|'.join(kinds)})', or {advice}"
    raise RecipeError(message, hint=advice or None)


def _misfit(pattern: Pattern, rows: int, cols: int, name: str) -> GossamerError | None:
    try:
        pattern.check(rows, cols, name)
    except GossamerError as error:
        return error
    return None


def _kind(name: str) -> str:
    """The last part of a name that is no number: what the matrix is called in every block."""
    return next(part for part in reversed(name.split(".")) if not part.isdigit())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _examples(names: list[str]) -> str:
    return ", ".join(names[:3])
