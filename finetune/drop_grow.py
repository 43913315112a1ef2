"""Dynamic sparse training: which weights of a matrix give their place to which others, under a fixed budget.

    drop   the n kept weights with the smallest |w|
    grow   the n pruned weights with the largest |dL/dw|, at zero

n = share(t) * kept, share(t) = drop / 2 (1 + cos(pi t / end)). What was pruned a moment ago is not grown at once, so
exactly n places move. A structure is kept: N:M masks move inside a group, block masks in whole blocks.

Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020 (RigL; there a dropped weight may be grown
again in the same move, and the step that moves does not train).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..pruning.pattern import NM, Block, Pattern
from ..pruning.selection import keep_all_but


def share_at(step: int, end: int, drop: float) -> float:
    """Share of the kept weights that moves after `step` optimizer steps; 0 from `end` on."""
    return drop / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def move(weight: Tensor, gradient: Tensor, keep: Tensor, share: float, pattern: Pattern | None = None) -> Tensor:
    """The mask after one move.

    Args:
        weight, gradient: [out, in]; the gradient is that of all entries, pruned ones too.
        keep: bool [out, in], not modified.
        share: of the kept weights (groups, blocks) that moves, rounded down.
        pattern: whose structure `keep` has; None or an unstructured one: none.

    Returns:
        bool [out, in] with as many True as `keep`; per group of an N:M pattern too.
    """
    size, slope = weight.detach().abs().float(), gradient.detach().abs().float()
    if isinstance(pattern, NM):
        return _in_groups(size, slope, keep, share, pattern.group)
    if isinstance(pattern, Block):
        rows, cols = pattern.rows, pattern.cols
        grid = keep[::rows, ::cols]
        moved = _anywhere(_sums(size, rows, cols), _sums(slope, rows, cols), grid, share)
        return moved.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return _anywhere(size, slope, keep, share)


def _anywhere(size: Tensor, slope: Tensor, keep: Tensor, share: float) -> Tensor:
    kept = int(keep.sum())
    count = min(int(share * kept), keep.numel() - kept)
    if count == 0:
        return keep.clone()
    stay = keep_all_but(size.masked_fill(~keep, torch.inf), count)
    grown = keep_all_but(slope.masked_fill(keep, -1.0), keep.numel() - count)
    return (keep & stay) | grown


def _in_groups(size: Tensor, slope: Tensor, keep: Tensor, share: float, group: int) -> Tensor:
    """The groups whose smallest kept weight is smallest swap it for their pruned weight of the largest slope."""
    kept = keep.reshape(-1, group)
    smallest, out = size.reshape(-1, group).masked_fill(~kept, torch.inf).min(1)
    into = slope.reshape(-1, group).masked_fill(kept, -1.0).argmax(1)
    able = kept.any(1) & ~kept.all(1)
    count = min(int(share * int(keep.sum())), int(able.sum()))
    chosen = ~keep_all_but(smallest.masked_fill(~able, torch.inf), count)
    moved = kept.clone()
    rows = chosen.nonzero().flatten()
    moved[rows, out[rows]] = False
    moved[rows, into[rows]] = True
    return moved.view(keep.shape)


def _sums(values: Tensor, rows: int, cols: int) -> Tensor:
    """Sums over blocks, [out / rows, in / cols]."""
    return values.reshape(len(values) // rows, rows, -1, cols).sum((1, 3))
