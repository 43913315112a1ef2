"""A linear layer that does not read the weights of small inputs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from ...errors import KernelError
from ..arguments import check_weight
from ..channel_gemv.dispatch import channel_gemv, transpose
from .linear import SparseLinear, ThresholdMixin
from .weight import PackedWeight


class ChannelSparseLinear(ThresholdMixin, SparseLinear):
    """y = x W^T + b, where for 1 to 8 rows inputs with |x_i| <= threshold_i count as zero and are not read.

    Holds W^T [in, out], float32, bfloat16 or float16, and thresholds, float32 [in]. More rows, and rows with a
    gradient, are the dense layer: no input is skipped. `state_dict()` has the dense `weight` and no thresholds: they
    belong to the module.
    """

    weight_t: Tensor

    def __init__(self, weight_t: Tensor, threshold: Tensor, bias: Tensor | None = None) -> None:
        """weight_t: [in, out], contiguous, from `channel_gemv.dispatch.transpose`. bias: [out] or None."""
        weight_t = weight_t.detach()
        check_weight(weight_t, "weight_t")
        super().__init__(weight_t.shape[1], weight_t.shape[0], weight_t.dtype, bias)
        self.register_buffer("weight_t", weight_t, persistent=False)
        self.hold_threshold(threshold, self.in_features)

    @classmethod
    def from_dense(cls, weight: Tensor, threshold: Tensor, bias: Tensor | None = None) -> ChannelSparseLinear:
        """From W [out, in]; threshold [in], or one number for all inputs."""
        if weight.dim() != 2:
            raise KernelError(f"weight has shape {list(weight.shape)}, it must be a matrix")
        weight_t = transpose(weight.detach().cpu()).to(weight.device)
        return cls(weight_t, threshold.to(weight.device).expand(weight.shape[1]), bias)

    @property
    def weight(self) -> PackedWeight:
        weight_t = self.weight_t
        shape = (self.out_features, self.in_features)
        return PackedWeight(shape, (shape[1], 1), self.dtype, weight_t.device, lambda: weight_t.t().contiguous())

    def dense_weight(self) -> Tensor:
        return self.weight_t.t().contiguous()

    def take(self, weight: Tensor) -> str | None:
        fault = self._misshapen(weight)
        if fault is None:
            self.weight_t = transpose(weight.detach().to("cpu", self.dtype)).to(self.weight_t.device)
        return fault

    def _few(self, x: Tensor) -> Tensor:
        return channel_gemv(x, self.weight_t, self.threshold)

    def _many(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight_t.t())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChannelSparseLinear:
        super()._apply(fn, recurse)
        self.dtype = self.weight_t.dtype
        return self
