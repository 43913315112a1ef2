"""Small pieces of linear algebra on a Gram matrix that several stages share; each makes one [in, in] matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_diagonal(gram: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """d = sqrt(diag(gram) + shift), float32 [in], and (gram + shift I) / (d d^T), float32 [in, in]."""
    scale = (gram.diagonal().clamp_min(0) + shift).sqrt()
    scaled = gram / scale
    scaled /= scale[:, None]
    scaled.diagonal().fill_(1.0)
    return scale, scaled


def shifted_inverse(gram: Tensor, shift: float) -> Tensor:
    """(gram + shift I)^-1, float32 [in, in], made in place in one copy of `gram`.

    Rounding can cost a float32 Gram matrix its definiteness; the shift then grows tenfold until the factor exists.
    """
    factor = shifted_factor(gram, shift)
    while factor is None:
        shift *= 10
        factor = shifted_factor(gram, shift)
    return torch.cholesky_inverse(factor, out=factor)


def shifted_factor(gram: Tensor, shift: float) -> Tensor | None:
    """Lower Cholesky factor of gram + shift I, float32 [in, in], or None if that is not positive definite."""
    matrix = gram.clone()
    matrix.diagonal().add_(shift)
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return matrix if int(info) == 0 else None
