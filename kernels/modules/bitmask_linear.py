"""A linear layer whose 16-bit weights stay packed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bitmask_gemv import dispatch as layout
from ..together.dispatch import together
from .kept_linear import KeptLinear
from .siblings import product


class BitmaskLinear(KeptLinear):
    """A KeptLinear that is computed together with the layers that get the same x (siblings.py)."""

    describe = staticmethod(layout.describe)
    pack = staticmethod(layout.pack)
    unpack = staticmethod(layout.unpack)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> BitmaskLinear:
        """From W [out, in] and a bool mask of its shape, True where a weight is kept; W elsewhere is not looked at."""
        return cls(cls.packed_from(weight, mask), bias)

    def gemv(self, x: Tensor) -> Tensor:
        return layout.bitmask_gemv(x, self.packed, self.out_features)

    def few_product(self, x: Tensor) -> Tensor:
        return product(self, x, together)

    def expand(self, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return layout.bitmask_dense(packed, rows, cols, dtype)
