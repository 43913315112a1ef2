"""The result of `dense_gemv` in plain torch, on any device."""

from __future__ import annotations

from torch import Tensor


def dense_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed, products and sums in float32, rounded once to x's dtype."""
    return (x.float() @ weight.float().t()).to(x.dtype)
