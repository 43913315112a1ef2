"""One matrix: the method's answer inside the masks of earlier stages, and how far it is from the matrix aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...pruning.base import LayerStats, relative_errors
from ...pruning.pattern import Pattern


def solve(
    method: Any,
    weight: Tensor,
    stats: LayerStats | None,
    pattern: Pattern,
    kept: Tensor | None,
    note: Callable[[str], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """(new weight float32, mask, dense matrix aimed at), all [out, in]; the mask lies inside `kept`, if given.

    The matrix aimed at is `weight`, unless the method says otherwise (`Method`).
    """
    towards = getattr(method, "prune_towards", None)
    if towards is None:
        new, mask = method.prune(weight, stats, pattern, note)
        aim = weight
    else:
        new, mask, aim = towards(weight, stats, pattern, note)
    if kept is None or not bool((mask & ~kept).any()):
        return new, mask, aim
    # A method that updates weights may revive entries: choose again among the allowed ones by the new values.
    mask = pattern.mask(new.abs().masked_fill(~kept, -1.0)) & kept
    return torch.where(mask, torch.where(new != 0, new, weight.float()), 0.0), mask, aim


def output_errors(aim: Tensor, pruned: Sequence[Tensor], stats: LayerStats | None) -> list[float | None]:
    """||(aim - W') X||^2 / ||aim X||^2 of every W' on the calibration inputs; None when nothing was measured."""
    if stats is None or stats.gram is None or stats.tokens == 0:
        return [None] * len(pruned)
    return [round(error, 6) for error in relative_errors(aim, pruned, stats)]
