"""The result of `bitmask_gemv` in plain torch: the product with the dense matrix, +0.0 where nothing is kept."""

from __future__ import annotations

from torch import Tensor

from ..bitmask import reference as bitmask
from .layout import unpack


def bitmask_gemv(x: Tensor, packed: Tensor) -> Tensor:
    """x [..., in] times the packed matrix [out, in] transposed; products and sums in float32, rounded once.

    Pruned entries multiply as +0.0, so an infinity in x makes NaN of every output, as with the dense matrix.
    """
    bits, values, cols = unpack(packed.cpu())
    weight = bitmask.expand(values, bits, cols).to(x.device)
    return (x.float() @ weight.float().t()).to(x.dtype)
