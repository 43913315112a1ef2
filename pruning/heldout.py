"""What the held-out tokens decide: how far to follow the dense target, and how much to damp.

The statistics cover all tokens. Taking the held-out ones away gives the training statistics; a solution made from
those is judged on the held-out tokens, on a few evenly spaced output rows (the choice is one number for the matrix).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import LayerStats, Log
from .gram import Resolvent, shifted_factor, unit_diagonal
from .support import solve_on_support


@dataclass(frozen=True)
class Split:
    """Training statistics and held-out tokens for some rows of a matrix.

    Attributes:
        rows: int64 [k], the output rows judged.
        gram: float32 [in, in], training tokens only.
        excess: float32 [k, in], sum (y - W x) x^T over the training tokens.
        x: float32 [t, in], held-out inputs.
        error: float32 [t, k], y - W x on the held-out tokens.
        dense: float32 [k, in], the rows of W.
    """

    rows: Tensor
    gram: Tensor
    excess: Tensor
    x: Tensor
    error: Tensor
    dense: Tensor


def split_statistics(dense: Tensor, stats: LayerStats, probe_rows: int, log: Log) -> Split | None:
    """The training part of `stats`; None without a target or held-out tokens, or if those are not part of the Gram."""
    if (stats.target is None and stats.excess is None) or stats.holdout is None or stats.holdout.x.numel() == 0:
        return None
    assert stats.gram is not None
    x, y = stats.holdout.x, stats.holdout.y
    gram = torch.addmm(stats.gram, x.t(), x, alpha=-1)
    diagonal = stats.gram.diagonal()
    if bool((gram.diagonal() < -1e-4 * diagonal).any()):
        log("the held-out tokens are not part of the Gram matrix; the dense target is not used")
        return None
    count = min(probe_rows, len(dense))
    rows = torch.arange(count, device=dense.device) * len(dense) // count
    part = dense[rows]
    error = y[:, rows] - x @ part.t()
    if stats.excess is not None:
        excess = stats.excess[rows]
    else:
        assert stats.target is not None
        excess = stats.target[rows] - part @ stats.gram
    excess.addmm_(error.t(), x, alpha=-1)
    return Split(rows, gram, excess, x, error, part)


def choose_target(
    dense: Tensor, stats: LayerStats, split: Split, dampings: Sequence[float], level: float
) -> tuple[Tensor, Tensor]:
    """W* = W + beta (T - W G)(G + lambda I)^-1 with lambda and beta in [0, 1] of least held-out error.

    For a given lambda the held-out error is a parabola in beta. `level`: mean diagonal of G, the unit of `dampings`.

    Returns:
        W*, float32 [out, in], made in place in `dense` (W itself when no correction helps); and its rows `split.rows`
        from training tokens only, float32 [k, in].
    """
    best, beta, damping, probe = 0.0, 0.0, dampings[0], split.dense
    for candidate in dampings:
        correction = _solve(split.excess, split.gram, candidate * level)
        if correction is None:
            continue
        change = split.x @ correction.t()
        energy = float(change.square().sum(dtype=torch.float64))
        overlap = float((change * split.error).sum(dtype=torch.float64))
        share = min(1.0, max(0.0, overlap / energy)) if energy > 0 else 0.0
        gain = share * (2 * overlap - share * energy)
        if gain > best:
            best, beta, damping, probe = gain, share, candidate, split.dense + share * correction
    if beta == 0.0:
        return dense, probe
    assert stats.gram is not None
    excess = stats.excess
    if excess is None:
        assert stats.target is not None
        excess = torch.addmm(stats.target, dense, stats.gram, alpha=-1)
    Resolvent(stats.gram, damping * level, len(dense)).add_to(dense, excess, beta)
    return dense, probe


def choose_damping(
    probe: Tensor, keep: Tensor, split: Split, dampings: Sequence[float], level: float, iterations: int
) -> float:
    """The damping under which `probe` [k, in], re-solved on the support `keep`, has the least held-out error.

    `iterations`: of conjugate gradient, for each damping.
    """
    best, chosen = torch.inf, dampings[0]
    for damping in dampings:
        scale, scaled = unit_diagonal(split.gram, damping * level)
        goal = probe * scale
        values = solve_on_support(goal, goal, scaled, keep, iterations).div_(scale)
        del scaled
        left = split.error - split.x @ (values - split.dense).t()
        error = float(left.square().sum(dtype=torch.float64))
        if error < best:
            best, chosen = error, damping
    return chosen


def _solve(right: Tensor, gram: Tensor, shift: float) -> Tensor | None:
    """right (gram + shift I)^-1, or None if that is not positive definite."""
    factor = shifted_factor(gram, shift)
    return None if factor is None else torch.cholesky_solve(right.t(), factor).t()
