"""Mask by the alternating direction method of multipliers (ADMM) on the layer's quadratic loss.

    minimise tr((P - W) A (P - W)^T)  subject to P = D,  D in the pattern

Each step solves for P in closed form, projects P + U on the pattern and adds the difference to the scaled dual U:

    P = W + rho (D - U - W) (A + rho I)^-1,   D = project(P + U),   U = U + P - D.

A small penalty rho lets the weights move far and the mask change; a large one makes P and D agree. Here rho climbs
through a short list, so that one Cholesky factor or inverse per value is enough and no eigendecomposition is needed. A
must have a unit diagonal (inputs scaled by their norm): then |P + U| is the right score for every input, and one list
of penalties fits all layers.

After Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS
2024, and Boza, "Fast and Effective Weight Update for Pruned Large Language Models", 2024; both let rho grow by rules of
their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gram import Resolvent
from .pattern import Pattern, Unstructured

SAMPLE = 2**20  # entries from which the threshold of an intermediate projection over a whole matrix is read
SLAB = 512  # rows per selection


def admm_mask(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    penalties: Sequence[float],
    steps: int,
    loudness: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sparse iterate D after `steps` projections at each penalty.

    Args:
        weight: float32 [out, in], the dense weight in the scaled coordinates.
        gram: float32 [in, in], positive semi-definite with unit diagonal. Not modified.
        pattern: gives the mask of a score matrix.
        penalties: rho > 0, ascending.
        steps: projections per penalty, at least 1. The first one is of W itself and costs no product.
        loudness: float32 [out, 1] > 0: scores of a row are divided by it. Rows are independent but for their share of
            the budget, so this weighs the rows' losses and changes nothing else.

    Returns:
        D, float32 [out, in] (zero outside the mask), and the mask, bool [out, in], True = kept, with the exact count.

    Working memory: one factor or inverse [in, in] and three matrices [out, in].
    """
    if steps < 1 or not penalties or min(penalties) <= 0:
        raise ValueError(f"ADMM needs positive penalties and at least one step, got {list(penalties)} and {steps}")
    sparse = torch.empty_like(weight)
    dual = weight.clone()  # holds P + U between a solve and the next projection; the first P is W, with U = 0
    previous = penalties[0]
    for index, rho in enumerate(penalties):
        left = steps if index else steps - 1
        if left == 0:
            continue
        inverse = Resolvent(gram, rho, len(weight), left)
        for _ in range(left):
            torch.mul(dual, _quick_mask(_scores(dual, loudness), pattern), out=sparse)
            dual.sub_(sparse).mul_(previous / rho)  # U is the multiplier divided by rho
            previous = rho
            sparse.sub_(dual).sub_(weight)
            inverse.add_to(dual, sparse, rho)
            dual.add_(weight)
        del inverse
    del sparse
    keep = pattern.mask(_scores(dual, loudness))
    return dual.masked_fill_(~keep, 0.0), keep


def _scores(values: Tensor, loudness: Tensor | None) -> Tensor:
    scores = values.abs()
    return scores if loudness is None else scores.div_(loudness)


def _quick_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """`pattern.mask` for intermediate projections, whose counts may be slightly off.

    The exact selection of a whole matrix takes three times its memory, and the sort per row that unequal counts need
    takes as long as a product with the Gram matrix.
    """
    rows, cols = scores.shape
    if not isinstance(pattern, Unstructured):
        return pattern.mask(scores)
    if pattern.scope == "matrix":
        sample = scores.flatten()[:: max(1, scores.numel() // SAMPLE)]
        zeros = round(pattern.zeros(rows, cols) / scores.numel() * sample.numel())
        return scores > sample.kthvalue(zeros).values if zeros else torch.ones_like(scores, dtype=torch.bool)
    zeros = pattern.zeros(rows, cols) // rows
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return torch.cat([slab > slab.kthvalue(zeros, dim=1, keepdim=True).values for slab in scores.split(SLAB)])
