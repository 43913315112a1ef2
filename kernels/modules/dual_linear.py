"""A linear layer with a packed sparse weight that does not read the weights of small inputs either."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dual_gemv import dispatch as layout
from .kept_linear import KeptLinear
from .thresholds import ThresholdLinear


class DualSparseLinear(ThresholdLinear, KeptLinear):
    """y = x W^T + b for a W [out, in] of which only mask and kept values are held, and read for large inputs only.

    `state_dict()` has the dense `weight`; mask and thresholds belong to the module.
    """

    describe = staticmethod(layout.describe)
    pack = staticmethod(layout.pack)
    unpack = staticmethod(layout.unpack)

    def __init__(
        self,
        packed: Tensor,
        threshold: Tensor,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        prefill: str = "streamed",
    ) -> None:
        """packed: from `dual_gemv.dispatch.pack`. bias: [out] or None; a Parameter stays the same object."""
        super().__init__(packed, bias, transposed=transposed, prefill=prefill)
        self.hold_threshold(threshold)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor, threshold: Tensor, bias: Tensor | None = None
    ) -> DualSparseLinear:
        """From W [out, in], a bool mask of its shape, True where a weight is kept, and threshold [in] or one number."""
        packed = cls.packed_from(weight, mask)
        return cls(packed, threshold.to(weight.device).expand(weight.shape[1]), bias)

    def gemv(self, x: Tensor) -> Tensor:
        return layout.dual_gemv(x, self.packed, self.threshold, self.out_features, self.start())

    def expand(self, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return layout.dual_dense(packed, rows, cols, dtype)
