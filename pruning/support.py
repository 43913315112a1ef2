"""The best values on a fixed support: conjugate gradient on the normal equations, all rows at once.

For every row the kept entries P_S minimise (p - w) A (p - w)^T, that is A_SS p_S = (A w)_S. Conjugate gradient needs
one product of the whole direction matrix with A per iteration, whatever the supports are, and each row has its own step
length. Directions are projected on the support, so pruned entries stay exactly zero; the gradient is kept whole, which
costs nothing and is what swaps (`swap.py`) start from.

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
    slab = Slab(min(SLAB, len(values)), values)
    for first in range(0, len(values), SLAB):
        rows = slice(first, first + SLAB)
        slab.begin(values[rows], weight[rows], gram, keep[rows])
        slab.descend(iterations, tolerance)
    return values


class Slab:
    """Some rows of P and the gradient (weight - P) gram of their loss, which follows every change of P.

    The buffers [rows, in] serve all slabs and iterations: fresh pages cost as much as the arithmetic.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        """For up to `rows` rows of a matrix such as `like`."""
        self._buffers = tuple(like.new_empty(rows, like.shape[1]) for _ in range(5))

    def begin(self, values: Tensor, weight: Tensor, gram: Tensor, keep: Tensor) -> None:
        """Take on other rows: views of P (changed in place from here on), of the dense weight and of the mask."""
        self.values, self.keep, self.gram = values, keep, gram
        self.gradient, self._direction, self._image, self._mask, self._product = (
            b[: len(values)] for b in self._buffers
        )
        torch.sub(weight, values, out=self._image)
        torch.mm(self._image, gram, out=self.gradient)

    def descend(self, iterations: int, tolerance: float = TOLERANCE) -> None:
        """Conjugate gradient on the support `keep`, as it is now."""
        gradient, direction, image, mask = self.gradient, self._direction, self._image, self._mask
        mask.copy_(self.keep)  # multiplying by bool makes a float copy of it every time
        torch.mul(gradient, mask, out=direction)
        energy = _row_energy(direction)
        goal = energy * tolerance**2
        for _ in range(iterations):
            active = energy > goal
            if not bool(active.any()):
                break
            torch.mm(direction, self.gram, out=image)
            curvature = torch.mul(direction, image, out=self._product).sum(1, keepdim=True)
            step = _ratio(energy, curvature, active)
            self.values.addcmul_(direction, step)
            gradient.addcmul_(image, step, value=-1)
            torch.mul(gradient, mask, out=image)
            after = _row_energy(image)
            direction.mul_(_ratio(after, energy, active)).add_(image)
            energy = after


def _row_energy(matrix: Tensor) -> Tensor:
    """Squared norm of every row, [rows, 1]."""
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True).square_()


def _ratio(above: Tensor, below: Tensor, active: Tensor) -> Tensor:
    """above / below for active rows with a positive denominator, else 0 (a finished row stands still)."""
    good = active & (below > 0)
    return torch.where(good, above / below.where(good, torch.ones_like(below)), torch.zeros_like(above))
