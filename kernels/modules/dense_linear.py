"""torch's linear layer with our product for few tokens: what runs beside sparse layers, and the baseline for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import CODES, MAX_ROWS
from ..dense_gemv.dispatch import dense_gemv
from ..memory import empty_weight
from ..together.dispatch import together
from .siblings import Siblings, product, wants_gradient
from .sparse_linear import dense_only


class DenseLinear(nn.Linear):
    """An nn.Linear whose products of 1 to 8 rows without gradient, on the CPU, go through `dense_gemv`.

    Everything else is nn.Linear's. `adopt` turns a layer into one: parameters, hooks and ties stay.
    """

    siblings: Siblings | None = None
    alone = False

    @classmethod
    def adopt(cls, layer: nn.Linear) -> DenseLinear:
        """`layer` itself, from now on of this class, its weight in large pages: 1.3 to 2 times as fast to read."""
        weight = layer.weight
        if weight.is_cpu and weight.dtype in CODES and not weight.is_meta:
            weight.data = empty_weight(*weight.shape, dtype=weight.dtype).copy_(weight.data)
        layer.__class__ = cls
        return layer  # type: ignore[return-value]

    def matrix(self) -> Tensor:
        """The weight, as the kernels take it."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not (
            x.is_cpu
            and x.dtype is weight.dtype
            and x.dtype in CODES
            and 1 <= x.shape[:-1].numel() <= MAX_ROWS
            and x.is_contiguous()
            and weight.is_contiguous()
            and not wants_gradient(x, weight)
            and not torch.is_autocast_enabled("cpu")
        ):
            return functional.linear(x, weight, self.bias)
        if torch.compiler.is_compiling():
            y = dense_gemv(x, weight)
        elif dense_only():
            return functional.linear(x, weight, self.bias)
        else:
            y = product(self, x, together)
        return y if self.bias is None else y + self.bias
