"""A linear layer whose weight stays packed: the bitmask kernel for few tokens, one dense view at a time for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import MAX_ROWS
from ..bitmask import dispatch as bitmask
from ..bitmask_gemv.dispatch import bitmask_dense, bitmask_gemv, dense, describe, pack, unpack
from .parts import DenseProduct, checked_input, load_weight, own_bias
from .weight import PackedWeight, packed_weight


class BitmaskLinear(nn.Module):
    """y = x W^T + b for a W [out, in] of which only mask and kept values are held.

    x [..., in] in the dtype of W, bfloat16 or float16; y [..., out]. 1 to 8 rows without gradient go through
    `bitmask_gemv`; others through the dense view of W, which is freed after the product, and made again by the backward
    pass. W takes no gradient; x and the bias do. The bias is added after rounding, in the dtype of y.

    `weight` is a PackedWeight. `state_dict()` has the dense `weight`, as of nn.Linear, and `load_state_dict` takes one
    whose entries outside the mask are zero: the mask belongs to the module.
    """

    packed: Tensor

    def __init__(self, packed: Tensor, bias: Tensor | None = None) -> None:
        """packed: from `bitmask_gemv.dispatch.pack`. bias: [out] or None; a Parameter stays the same object."""
        super().__init__()
        record = describe(packed)
        self.in_features, self.out_features, self.dtype = record.cols, record.rows, record.dtype
        self.register_buffer("packed", packed, persistent=False)
        self.register_parameter("bias", own_bias(bias, record.rows))

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> BitmaskLinear:
        """From W [out, in] and a bool mask of its shape, True where a weight is kept; W elsewhere is not looked at."""
        bits = bitmask.pack_bits(mask.cpu())
        packed = pack(bits, bitmask.compress(weight.detach().cpu(), bits), weight.shape[1])
        return cls(packed.to(weight.device), bias)

    @property
    def weight(self) -> PackedWeight:
        return packed_weight(self.packed, self.out_features, self.in_features, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = checked_input(x, self.dtype, self.in_features)
        rows = x.shape[:-1].numel()
        if 1 <= rows <= MAX_ROWS and not (x.requires_grad and torch.is_grad_enabled()):
            y = bitmask_gemv(x.contiguous(), self.packed, self.out_features)
        else:
            y = DenseProduct.apply(x, self.packed, bitmask_dense, self.out_features, self.in_features, self.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitmaskLinear:
        """`.to`, `.half` and the like: the packed bytes move, their values are cast. KernelError for float32."""
        wanted = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        if wanted is not self.dtype:
            bits, values, cols = unpack(self.packed)
            self.packed = pack(bits, values.to(wanted), cols).to(self.packed.device)
            self.dtype = wanted
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = dense(self.packed)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        load_weight(prefix + "weight", self._take, state_dict, strict, missing_keys, unexpected_keys, error_msgs)

    def _take(self, weight: Tensor) -> str | None:
        """Packs a dense W under the module's mask; what is wrong with it, or None."""
        shape = (self.out_features, self.in_features)
        if weight.shape != shape:
            return f"shape {list(weight.shape)}, the sparse module has {list(shape)}"
        bits, _, cols = unpack(self.packed)
        weight = weight.detach().to("cpu", self.dtype)
        values = bitmask.compress(weight, bits)
        if int(weight.count_nonzero()) != int(values.count_nonzero()):
            return "values that are not zero where the sparse module is pruned"
        self.packed = pack(bits, values, cols).to(self.packed.device)
        return None
