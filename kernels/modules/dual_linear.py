"""A linear layer with a packed sparse weight that does not read the weights of small inputs either."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..dual_gemv import dispatch as dual
from .linear import PackedLinear, ThresholdMixin


class DualSparseLinear(ThresholdMixin, PackedLinear):
    """y = x W^T + b for a W [out, in] of which only mask and kept values are held.

    x [..., in] in the dtype of W, bfloat16 or float16. 1 to 8 rows without gradient go through `dual_gemv`: inputs with
    |x_i| <= threshold_i (float32 [in]) count as zero and are not read. Others go through the dense view of W, which is
    freed after the product, and no input is skipped. `state_dict()` has the dense `weight`; mask and thresholds belong
    to the module.
    """

    describe = staticmethod(dual.describe)
    pack = staticmethod(dual.pack)
    unpack = staticmethod(dual.unpack)
    dense_view = staticmethod(dual.dual_dense)

    def __init__(self, packed: Tensor, threshold: Tensor, bias: Tensor | None = None) -> None:
        """packed: from `dual_gemv.dispatch.pack`. bias: [out] or None; a Parameter stays the same object."""
        super().__init__(packed, bias)
        self.hold_threshold(threshold, self.in_features)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor, threshold: Tensor, bias: Tensor | None = None
    ) -> DualSparseLinear:
        """From W [out, in], a bool mask of its shape, True where a weight is kept, and threshold [in] or one number."""
        packed = cls.packed_from(weight, mask)
        return cls(packed, threshold.to(weight.device).expand(weight.shape[1]), bias)

    def _few(self, x: Tensor) -> Tensor:
        return dual.dual_gemv(x, self.packed, self.threshold, self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualSparseLinear:
        super()._apply(fn, recurse)
        return self
