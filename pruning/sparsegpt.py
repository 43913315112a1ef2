"""SparseGPT: columns left to right, each error made good by the columns that follow.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023.

The paper updates all later columns with the inverse Hessian. Here the same numbers come from the Gram matrix's own
factor: with H = R R^T (R upper) and e = w - w' the error of a row,

    e H e^T = sum_k (sum_{j<=k} e_j R_jk)^2,

so after the columns P before a strip S are settled, the best values of the strip make its terms zero: v_S = w_S +
e_P R_PS (R_SS)^-1. Inside the strip the paper's own update holds with U = (R_SS)^-1, because the inverse of an upper
triangular matrix has the inverses of its diagonal blocks on the diagonal. So only 128 x 128 corners are ever inverted,
and a strip needs one product with the errors so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LayerStats, Log, prepare, silent
from .linalg import upper_factor
from .pattern import NM, Block, Pattern, Unstructured
from .selection import keep_all_but, keep_all_but_per_row, keep_blocks

BLOCK = 128
PANEL = 16


class SparseGPT:
    """score = v_k^2 / U_kk^2 on the weights updated so far.

    Unstructured masks are chosen per block of 128 columns (over all rows together, or per row with scope "row"), N:M
    masks at the start of each group, block masks per strip of columns. Strips end on a group's or block's edge, and
    their counts are rounded cumulatively so that the whole is exact. Inputs that never fire are neither zeroed nor
    adjusted beyond that.
    """

    name = "sparsegpt"
    needs = frozenset({"gram"})
    order = "block"
    scope = "matrix"

    def prune(self, weight: Tensor, stats: LayerStats, pattern: Pattern, log: Log = silent) -> tuple[Tensor, Tensor]:
        """See `Method.prune`."""
        dense = prepare(weight, stats, self.needs, pattern)
        rows, cols = dense.shape
        if pattern.zeros(rows, cols) == 0:
            return dense, torch.ones_like(dense, dtype=torch.bool)
        assert stats.gram is not None
        factor = upper_factor(stats.gram, log)
        values = dense.t().contiguous()
        del dense
        keep = _sweep(values, factor, pattern)
        return values.t().contiguous(), keep.t().contiguous()


def _sweep(values: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """Prune `values` [in, out] (the transposed weight: a column is contiguous) in place; the mask, bool [in, out]."""
    cols = len(values)
    errors = torch.empty_like(values)
    keep = torch.empty_like(values, dtype=torch.bool)
    width, step = _widths(pattern)
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        strip = slice(start, stop)
        identity = torch.eye(stop - start, dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor[strip, strip], identity, upper=True)
        pivots = inverse.diagonal()
        pushed = factor[:start, strip].t() @ errors[:start]
        current = torch.addmm(values[strip], inverse.t(), pushed)
        spread = inverse / pivots[:, None]
        for first in range(start, stop, step):
            chosen = slice(first, min(first + step, stop))
            local = slice(chosen.start - start, chosen.stop - start)
            scores = (current[local] / pivots[local, None]).square_()
            keep[chosen] = _choose(scores.t(), pattern, chosen, cols).t()
            _eliminate(current, keep[chosen], spread, local)
        errors[strip] = values[strip] - current
        values[strip] = current
    return keep


def _eliminate(current: Tensor, keep: Tensor, spread: Tensor, columns: slice) -> None:
    """Zero the pruned entries of some columns of a strip [strip, out], spreading each over the later columns.

    spread[k, l]: how much of a unit removed at column k goes to column l. Panels keep the one-column updates in cache.
    """
    for first in range(columns.start, columns.stop, PANEL):
        last = min(first + PANEL, columns.stop)
        removed = torch.empty_like(current[first:last])
        for k in range(first, last):
            kept = keep[k - columns.start]
            removed[k - first] = current[k].masked_fill(kept, 0.0)
            current[k].masked_fill_(~kept, 0.0)
            current[k + 1 : last].addr_(spread[k, k + 1 : last], removed[k - first], alpha=-1)
        current[last:].addmm_(spread[first:last, last:].t(), removed, alpha=-1)


def _widths(pattern: Pattern) -> tuple[int, int]:
    """Columns per strip, and columns whose mask is chosen at once."""
    if isinstance(pattern, NM):
        return pattern.group * max(1, BLOCK // pattern.group), pattern.group
    if isinstance(pattern, Block):
        width = pattern.cols * max(1, BLOCK // pattern.cols)
        return width, width
    return BLOCK, BLOCK


def _choose(scores: Tensor, pattern: Pattern, columns: slice, cols: int) -> Tensor:
    """The mask of some columns, bool [out, columns]; the zeros of all calls add up to the pattern's own count."""
    rows = len(scores)
    if isinstance(pattern, NM):
        return pattern.mask(scores)
    if isinstance(pattern, Block):
        zeros = _share(pattern.zero_blocks(rows, cols), columns, cols)
        return keep_blocks(scores, pattern.rows, pattern.cols, zeros)
    assert isinstance(pattern, Unstructured)
    if pattern.scope == "row":
        totals = pattern.row_zeros(rows, cols)
        return keep_all_but_per_row(scores, _edge(totals, columns.stop, cols) - _edge(totals, columns.start, cols))
    return keep_all_but(scores, _share(pattern.zeros(rows, cols), columns, cols))


def _share(total: int, columns: slice, cols: int) -> int:
    """The part of `total` that falls to some columns; parts of adjacent columns add up without loss."""
    edges = _edge(torch.tensor([total, total]), torch.tensor([columns.start, columns.stop]), cols)
    return int(edges[1] - edges[0])


def _edge(total: Tensor, column: Tensor | int, cols: int) -> Tensor:
    """round(total * column / cols) in whole numbers."""
    return (2 * total * column + cols) // (2 * cols)
