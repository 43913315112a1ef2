"""A linear layer whose int8 weights stay packed: the int8 kernel for few tokens, one dense view at a time for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import KernelError
from ..arguments import CODES, MAX_ROWS, name
from ..int8_gemv.dispatch import dense, describe, int8_dense, int8_gemv
from .parts import DenseProduct, checked_input, load_weight, own_bias
from .weight import PackedWeight


class Int8BitmaskLinear(nn.Module):
    """y = x W^T + b for a W [out, in] held as mask, kept int8 values and a float16 scale per row and 128 columns.

    x [..., in] and y [..., out] in the compute dtype: bfloat16, float16 or float32. 1 to 8 rows without gradient go
    through `int8_gemv`, which quantises x to int8 as well; others, as they are, through the dense view of W in the
    compute dtype, which is freed after the product and made again by the backward pass. W takes no gradient; x and the
    bias do. The bias is added after rounding, in the dtype of y.

    `weight` is a PackedWeight. `.to(dtype)` changes the compute dtype, never what is held. `state_dict()` has the dense
    `weight`, as of nn.Linear; `load_state_dict` takes only these very numbers: quantising others would change them.
    """

    packed: Tensor

    def __init__(self, packed: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16) -> None:
        """packed: from `int8_gemv.dispatch.pack`. bias: [out] or None; a Parameter stays the same object."""
        super().__init__()
        record = describe(packed)
        self.in_features, self.out_features, self.dtype = record.cols, record.rows, _compute(dtype)
        self.register_buffer("packed", packed, persistent=False)
        self.register_parameter("bias", own_bias(bias, record.rows))

    @property
    def weight(self) -> PackedWeight:
        shape, strides = (self.out_features, self.in_features), (self.in_features, 1)
        packed, dtype = self.packed, self.dtype
        return PackedWeight(shape, strides, dtype, packed.device, lambda: dense(packed, dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = checked_input(x, self.dtype, self.in_features)
        rows = x.shape[:-1].numel()
        if 1 <= rows <= MAX_ROWS and not (x.requires_grad and torch.is_grad_enabled()):
            y = int8_gemv(x.contiguous(), self.packed, self.out_features)
        else:
            y = DenseProduct.apply(x, self.packed, int8_dense, self.out_features, self.in_features, self.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8BitmaskLinear:
        """`.to`, `.half` and the like: the packed bytes move, the compute dtype changes. KernelError for float64."""
        self.dtype = _compute(fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype)
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = dense(self.packed, self.dtype)
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
        load_weight(prefix + "weight", self._fault, state_dict, strict, missing_keys, unexpected_keys, error_msgs)

    def _fault(self, weight: Tensor) -> str | None:
        """Why a dense W cannot be taken; None for the very W that is held, rounded to its dtype."""
        shape = (self.out_features, self.in_features)
        if weight.shape != shape:
            return f"shape {list(weight.shape)}, the sparse module has {list(shape)}"
        if weight.dtype in CODES and torch.equal(dense(self.packed, weight.dtype), weight.to(self.packed.device)):
            return None
        return (
            "other weights than the int8 ones of the sparse module; quantising them here would change them unseen, so "
            "load them into a dense model and compress it anew"
        )


def _compute(dtype: torch.dtype) -> torch.dtype:
    if dtype not in CODES:
        raise KernelError(f"an int8 layer cannot compute in {name(dtype)}, allowed: {', '.join(map(name, CODES))}")
    return dtype
