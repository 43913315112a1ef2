"""A linear layer that does not read the weights of small inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_weight
from ..bitmask import dispatch as bitmask
from ..channel_gemv.dispatch import channel_gemv, transpose
from .sparse_linear import SparseLinear
from .thresholds import ThresholdLinear


class ChannelSparseLinear(ThresholdLinear):
    """y = x W^T + b for a dense W [out, in] that is read for large inputs only: float32, bfloat16 or float16.

    What it holds as `packed` is W^T [in, out], so its dense view costs nothing. `state_dict()` has the dense `weight`
    and no thresholds: they belong to the module.
    """

    def __init__(
        self, weight_t: Tensor, threshold: Tensor, bias: Tensor | None = None, *, transposed: bool = False
    ) -> None:
        """weight_t: [in, out], contiguous, from `channel_gemv.dispatch.transpose`. bias: [out] or None."""
        weight_t = weight_t.detach()
        check_weight(weight_t, "weight_t")
        shape = (weight_t.shape[1], weight_t.shape[0])
        super().__init__(weight_t, shape, weight_t.dtype, bias, transposed=transposed)
        self.hold_threshold(threshold)

    @classmethod
    def from_dense(cls, weight: Tensor, threshold: Tensor, bias: Tensor | None = None) -> ChannelSparseLinear:
        """From W [out, in]; threshold [in], or one number for all inputs."""
        if weight.dim() != 2:
            raise KernelError(f"weight has shape {list(weight.shape)}, it must be a matrix")
        weight_t = transpose(weight.detach().cpu()).to(weight.device)
        return cls(weight_t, threshold.to(weight.device).expand(weight.shape[1]), bias)

    def gemv(self, x: Tensor) -> Tensor:
        return channel_gemv(x, self.packed, self.threshold, self.start())

    def expand(self, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return packed.t()

    def bits(self) -> Tensor:
        return bitmask.pack_bits(torch.ones(self.out_features, self.in_features, dtype=torch.bool))

    def take(self, weight: Tensor) -> str | None:
        weight = weight.detach().to("cpu", self.dtype)
        weight_t = weight.clone(memory_format=torch.contiguous_format) if self.transposed else transpose(weight)
        self.packed, self._view = weight_t.to(self.packed.device), None
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self.dtype = self.packed.dtype
        return self
