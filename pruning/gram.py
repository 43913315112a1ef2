"""Small pieces of linear algebra on a Gram matrix that several stages share; each makes one [in, in] matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import is_large

SLAB = 512  # rows per pair of triangular solves


def unit_diagonal(gram: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """d = sqrt(diag(gram) + shift), float32 [in], and (gram + shift I) / (d d^T), float32 [in, in]."""
    scale = (gram.diagonal().clamp_min(0) + shift).sqrt()
    scaled = gram / scale
    scaled /= scale[:, None]
    scaled.diagonal().fill_(1.0)
    return scale, scaled


class Resolvent:
    """(gram + shift I)^-1 as something to multiply with; holds one matrix [in, in].

    Rounding can cost a float32 Gram matrix its definiteness; the shift then grows tenfold until the factor exists.
    """

    def __init__(self, gram: Tensor, shift: float, rows: int, times: int = 1) -> None:
        """`rows`: how many rows will be multiplied, and how many `times`.

        A product costs less than two triangular solves, but the inverse has to be made first: for few rows of a large
        matrix the factor is faster.
        """
        factor = shifted_factor(gram, shift)
        while factor is None:
            shift *= 10
            factor = shifted_factor(gram, shift)
        self._solves = is_large(rows, len(gram)) and 2 * rows * times <= 3 * len(gram)
        self._matrix = factor if self._solves else torch.cholesky_inverse(factor, out=factor)

    def add_to(self, out: Tensor, rows: Tensor, alpha: float) -> None:
        """out += alpha rows (gram + shift I)^-1, in place; both float32 [n, in]."""
        if not self._solves:
            out.addmm_(rows, self._matrix, alpha=alpha)
            return
        for some, right in zip(out.split(SLAB), rows.split(SLAB), strict=True):
            some.add_(torch.cholesky_solve(right.t(), self._matrix).t(), alpha=alpha)


def shifted_factor(gram: Tensor, shift: float) -> Tensor | None:
    """Lower Cholesky factor of gram + shift I, float32 [in, in], or None if that is not positive definite."""
    matrix = gram.clone()
    matrix.diagonal().add_(shift)
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return matrix if int(info) == 0 else None
