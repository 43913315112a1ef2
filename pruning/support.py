"""The best values on a fixed support: conjugate gradient on the normal equations, all rows at once.

For every row the kept entries P_S minimise (p - w) A (p - w)^T, that is A_SS p_S = (A w)_S. Conjugate gradient needs
one product of the whole direction matrix with A per iteration, whatever the supports are, and each row has its own step
length. The gradient is projected on the support, so pruned entries stay exactly zero.

Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952; used for pruning by Meng et
al., "ALPS", NeurIPS 2024 (there with one step length per matrix).
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5
SLAB = 1024  # rows solved at once; bounds the working memory


def solve_on_support(
    start: Tensor, weight: Tensor, gram: Tensor, keep: Tensor, iterations: int, tolerance: float = TOLERANCE
) -> Tensor:
    """Minimise tr((P - weight) gram (P - weight)^T) over P that vanish outside `keep`.

    Args:
        start: float32 [out, in], the first P; entries outside `keep` are dropped.
        weight: float32 [out, in], the dense target.
        gram: float32 [in, in], symmetric positive semi-definite. Damping is the caller's: add it to the diagonal (a
            ridge towards `weight`). Inputs scaled to a unit diagonal converge fastest.
        keep: bool [out, in].
        iterations: at most this many products with `gram`, beside the first residual.
        tolerance: stop when every row's residual norm fell below this share of its first one.

    Returns:
        float32 [out, in]; no row's loss is above that of `start` on the support (beyond rounding).
    """
    if start.shape != weight.shape or keep.shape != weight.shape or gram.shape != 2 * (weight.shape[1],):
        raise ValueError(
            f"shapes do not agree: start {list(start.shape)}, weight {list(weight.shape)}, keep {list(keep.shape)}, "
            f"gram {list(gram.shape)}"
        )
    values = start * keep
    work = _Work(min(SLAB, len(values)), values)
    for first in range(0, len(values), SLAB):
        rows = slice(first, first + SLAB)
        _solve_slab(values[rows], weight[rows], gram, keep[rows], iterations, tolerance, work)
    return values


class _Work:
    """Matrices [rows, in] that all slabs and iterations use again: fresh pages cost as much as the arithmetic."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.residual, self.direction, self.image = (like.new_empty(rows, like.shape[1]) for _ in range(3))


def _solve_slab(
    values: Tensor, weight: Tensor, gram: Tensor, keep: Tensor, iterations: int, tolerance: float, work: _Work
) -> None:
    """Conjugate gradient on some rows, in place on `values`."""
    count = len(values)
    residual, direction, image = work.residual[:count], work.direction[:count], work.image[:count]
    torch.sub(weight, values, out=image)
    torch.mm(image, gram, out=residual)
    residual.mul_(keep)
    direction.copy_(residual)
    energy = _row_energy(residual)
    goal = energy * tolerance**2
    for _ in range(iterations):
        active = energy > goal
        if not bool(active.any()):
            break
        torch.mm(direction, gram, out=image)
        image.mul_(keep)
        curvature = torch.linalg.vecdot(direction, image)[:, None]
        step = _ratio(energy, curvature, active)
        values.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        after = _row_energy(residual)
        direction.mul_(_ratio(after, energy, active)).add_(residual)
        energy = after


def _row_energy(matrix: Tensor) -> Tensor:
    """Squared norm of every row, [rows, 1]."""
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True).square_()


def _ratio(above: Tensor, below: Tensor, active: Tensor) -> Tensor:
    """above / below for active rows with a positive denominator, else 0 (a finished row stands still)."""
    good = active & (below > 0)
    return torch.where(good, above / below.where(good, torch.ones_like(below)), torch.zeros_like(above))
