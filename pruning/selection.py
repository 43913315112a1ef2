"""Selection by rank: which entries of a score matrix are kept when an exact number must go.

No function here compares with a rounded quantile: a threshold that prunes "everything at or below" takes ties with it
and misses the count. The number of zeros is exact, and among equal scores the lower index is kept. Scores must not be
NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(total: int, parts: int) -> Tensor:
    """`total` cut into `parts` whole numbers that differ by at most one, evenly spaced, int64 [parts]."""
    edges = torch.arange(parts + 1, dtype=torch.int64) * total // parts
    return edges.diff()


def keep_all_but(scores: Tensor, zeros: int) -> Tensor:
    """True for all but the `zeros` lowest scores of the whole tensor (any shape)."""
    flat = scores.reshape(-1)
    if zeros <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if zeros >= flat.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(zeros + 1).values
    keep = flat > threshold
    missing = flat.numel() - zeros - int(keep.sum())
    keep[(flat == threshold).nonzero().flatten()[:missing]] = True
    return keep.view(scores.shape)


def keep_all_but_per_row(scores: Tensor, zeros: Tensor) -> Tensor:
    """True for all but the zeros[r] lowest scores of row r. scores [rows, cols], zeros int64 [rows] in [0, cols]."""
    cols = scores.shape[1]
    zeros = zeros.to(scores.device)
    ascending = scores.sort(dim=1).values
    threshold = ascending.gather(1, zeros.clamp(max=cols - 1).unsqueeze(1))
    keep = scores > threshold
    missing = cols - zeros - keep.sum(1)
    tied = scores == threshold
    simple = tied.sum(1) == missing
    keep |= tied & simple.unsqueeze(1)
    for row in (~simple).nonzero().flatten().tolist():
        keep[row, tied[row].nonzero().flatten()[: max(0, int(missing[row]))]] = True
    keep[zeros >= cols] = False
    return keep


def cheapest_counts(scores: Tensor, zeros: int) -> Tensor:
    """`zeros` cut into counts per row that differ by at most one, int64 [rows].

    The larger count goes to the rows whose next score is lowest; among equal ones to the higher rows.
    """
    rows, cols = scores.shape
    least, more = divmod(zeros, rows)
    counts = torch.full((rows,), least, dtype=torch.int64, device=scores.device)
    if more:
        following = scores.kthvalue(least + 1, dim=1).values if least < cols else scores.new_zeros(rows)
        order = following.flip(0).argsort(stable=True)
        counts[rows - 1 - order[:more]] += 1
    return counts


def keep_in_groups(scores: Tensor, keep: int, group: int) -> Tensor:
    """True for the `keep` highest of every `group` consecutive columns of a row. cols must be a multiple of group."""
    rows, cols = scores.shape
    order = scores.reshape(rows, cols // group, group).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :keep], True).view(rows, cols)


def keep_blocks(scores: Tensor, height: int, width: int, zeros: int) -> Tensor:
    """True outside the `zeros` blocks of height x width with the lowest summed score; blocks are ranked row by row."""
    rows, cols = scores.shape
    sums = scores.reshape(rows // height, height, cols // width, width).sum(dim=(1, 3))
    keep = keep_all_but(sums, zeros)
    return keep.repeat_interleave(height, 0).repeat_interleave(width, 1)
