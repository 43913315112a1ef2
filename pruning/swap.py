"""Refinement of a mask by single swaps: one kept weight goes, one pruned weight comes back with its best value.

For a row p with residual gradient r = (w - p) A the loss (p - w) A (p - w)^T changes exactly by

    p_i^2 A_ii + 2 p_i r_i - (r_j + p_i A_ij)^2 / A_jj

when entry i is set to zero and entry j to its best value (r_j + p_i A_ij) / A_jj, all others standing still. The first
two terms rank the entries to prune, r_j^2 / A_jj those to restore. A round takes the best few of each per row, gathers
the entries of A between them, and then swaps greedily by the exact change, updating r at the candidates only, until no
pair lowers the loss. Only then is r brought up to date everywhere. Every accepted swap lowers the loss of its row, and
rows (or N:M groups) keep their counts.

The swap without revaluation is in "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", 2025; swaps with
revaluation are the local search of Hazimeh and Mazumder, "Fast Best Subset Selection", Operations Research 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

MARGIN = 1e-6  # a swap must gain this share of the removed weight's own energy: rounding cannot make it cycle


@dataclass
class _Candidates:
    """Per row k entries to prune (at columns `out`) and k to restore (`back`), with what the exact change needs."""

    out: Tensor  # int64 [rows, k]
    back: Tensor  # int64 [rows, k]
    pairs: Tensor | None  # bool [rows, k, k], the pairs allowed; None = all
    valid_out: Tensor  # bool [rows, k]
    valid_back: Tensor  # bool [rows, k]


def refine(
    values: Tensor,
    keep: Tensor,
    weight: Tensor,
    gram: Tensor,
    *,
    group: int | None = None,
    candidates: int = 32,
    rows_at_once: int = 512,
) -> int:
    """One round of swaps, in place on `values` and `keep`.

    Args:
        values: float32 [out, in], zero outside `keep`. The search is best where they solve the support's normal
            equations (`support.solve_on_support`), but holds for any values.
        keep: bool [out, in].
        weight: float32 [out, in], the dense target.
        gram: float32 [in, in], symmetric, positive diagonal.
        group: swap only within `group` consecutive columns (an N:M pattern); None = anywhere in the row.
        candidates: entries per row considered on each side, hence at most this many swaps per row.
        rows_at_once: rows per slab; bounds the working memory.

    Returns:
        The number of swaps made; 0 means that no candidate pair lowers the loss.
    """
    if group is not None and weight.shape[1] % group:
        raise ValueError(f"{weight.shape[1]} inputs are not a multiple of the group {group}")
    made = 0
    for first in range(0, len(values), rows_at_once):
        rows = slice(first, first + rows_at_once)
        residual = (weight[rows] - values[rows]) @ gram
        chosen = _candidates(values[rows], keep[rows], residual, gram, group, candidates)
        made += _swap(values[rows], keep[rows], residual, gram, chosen)
    return made


def refine_slab(
    values: Tensor, keep: Tensor, residual: Tensor, gram: Tensor, *, group: int | None = None, candidates: int = 32
) -> int:
    """`refine` on a few rows whose residual gradient [rows, in] is at hand; it is brought up to date in place.

    A row changes in at most 2 * candidates entries, so this reads that many rows of `gram` instead of all of it.
    """
    chosen = _candidates(values, keep, residual, gram, group, candidates)
    columns = torch.cat([chosen.out, chosen.back], dim=1)
    before = values.gather(1, columns)
    made = _swap(values, keep, residual, gram, chosen)
    if made:
        change = values.gather(1, columns).sub_(before)
        change *= torch.cat([chosen.valid_out, chosen.valid_back], dim=1)  # others may name a column twice
        changed = change != 0
        ends = changed.sum(1).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        residual -= embedding_bag(columns[changed], gram, starts, mode="sum", per_sample_weights=change[changed])
    return made


def _candidates(
    values: Tensor, keep: Tensor, residual: Tensor, gram: Tensor, group: int | None, candidates: int
) -> _Candidates:
    diagonal = gram.diagonal()
    cost = (values * diagonal + 2 * residual).mul_(values).masked_fill_(~keep, torch.inf)
    gain = (residual.square() / diagonal).masked_fill_(keep, -torch.inf)
    if group is None:
        return _best_of_row(cost, gain, candidates)
    return _best_of_groups(values, cost, gain, residual, gram, group, candidates)


def _best_of_row(cost: Tensor, gain: Tensor, candidates: int) -> _Candidates:
    """The cheapest entries to prune and the most useful ones to restore."""
    size = min(candidates, cost.shape[1])
    cheap, out = cost.topk(size, dim=1, largest=False)
    useful, back = gain.topk(size, dim=1)
    return _Candidates(out, back, None, torch.isfinite(cheap), torch.isfinite(useful))


def _best_of_groups(
    values: Tensor, cost: Tensor, gain: Tensor, residual: Tensor, gram: Tensor, group: int, candidates: int
) -> _Candidates:
    """The best pair of every group by the exact change, then the groups with the largest gain."""
    rows, cols = values.shape
    count = cols // group
    index = torch.arange(cols, device=gram.device).view(count, group)
    corners = gram[index[:, :, None], index[:, None, :]]
    view = (rows, count, group)
    change = torch.full((rows, count), torch.inf, device=gram.device)
    out = torch.zeros((rows, count), dtype=torch.int64, device=gram.device)
    back = torch.zeros_like(out)
    restored = residual.view(view).masked_fill(gain.view(view) < 0, 0.0)
    for i in range(group):  # a loop over one side keeps the memory at a few matrices for any M
        removed = values.view(view)[:, :, i, None]
        moved = (restored + removed * corners[:, i]).square_() / corners.diagonal(dim1=1, dim2=2)
        moved.masked_fill_(gain.view(view) < 0, -torch.inf)
        best, where = moved.max(2)
        total = cost.view(view)[:, :, i] - best
        better = total < change
        change = torch.where(better, total, change)
        out.masked_fill_(better, i)
        back = torch.where(better, where, back)
    size = min(candidates, count)
    least, groups = change.topk(size, dim=1, largest=False)
    start = groups * group
    out, back = start + out.gather(1, groups), start + back.gather(1, groups)
    valid = torch.isfinite(least)
    pairs = torch.eye(size, dtype=torch.bool, device=gram.device).expand(rows, size, size)
    return _Candidates(out, back, pairs, valid, valid)


def _swap(values: Tensor, keep: Tensor, residual: Tensor, gram: Tensor, chosen: _Candidates) -> int:
    """Greedy swaps among the candidates, each by the exact change of the row's loss. In place on values and keep."""
    out, back = chosen.out, chosen.back
    diagonal = gram.diagonal()
    out_norm, back_norm = diagonal[out], diagonal[back]
    between = gram[out[:, :, None], back[:, None, :]]
    within_out = gram[out[:, :, None], out[:, None, :]]
    within_back = gram[back[:, :, None], back[:, None, :]]
    removed, slope_out, slope_back = values.gather(1, out), residual.gather(1, out), residual.gather(1, back)
    free_out, free_back = chosen.valid_out.clone(), chosen.valid_back.clone()
    rows = torch.arange(len(values), device=values.device)
    size, made = out.shape[1], 0
    for _ in range(size):
        own = removed.square() * out_norm
        cost = (own + 2 * removed * slope_out).masked_fill_(~free_out, torch.inf)
        change = slope_back[:, None, :] + removed[:, :, None] * between
        change = change.square_().div_(back_norm[:, None, :]).masked_fill_(~free_back[:, None, :], -torch.inf).neg_()
        change += cost[:, :, None]
        if chosen.pairs is not None:
            change.masked_fill_(~chosen.pairs, torch.inf)
        least, where = change.flatten(1).min(1)
        i, j = where // size, where % size
        accepted = least < -MARGIN * own[rows, i]
        if not bool(accepted.any()):
            break
        made += int(accepted.sum())
        r, i, j = rows[accepted], i[accepted], j[accepted]
        lost = removed[r, i]
        brought = (slope_back[r, j] + lost * between[r, i, j]) / back_norm[r, j]
        values[r, out[r, i]], values[r, back[r, j]] = 0.0, brought
        keep[r, out[r, i]], keep[r, back[r, j]] = False, True
        lost, brought = lost[:, None], brought[:, None]
        slope_out[r] += lost * within_out[r, i] - brought * between[r, :, j]
        slope_back[r] += lost * between[r, i] - brought * within_back[r, j]
        free_out[r, i], free_back[r, j] = False, False
    return made
