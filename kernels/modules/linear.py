"""What sparse linear layers share: they look like nn.Linear, whatever they hold."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import KernelError
from ..arguments import MAX_ROWS, name
from ..bitmask import dispatch as bitmask
from .weight import PackedWeight


def checked(x: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """x [..., features] in `dtype`, cast under autocast only; KernelError for anything else."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(dtype)
    if x.dtype is not dtype:
        raise KernelError(f"x is {name(x.dtype)}, the weight {name(dtype)}; they must be equal")
    if not x.dim() or x.shape[-1] != features:
        raise KernelError(f"x has shape {list(x.shape)}, its last length must be {features}")
    return x


def few(x: Tensor) -> bool:
    """Whether the kernels take x: 1 to 8 rows, no gradient."""
    return 1 <= x.shape[:-1].numel() <= MAX_ROWS and not (x.requires_grad and torch.is_grad_enabled())


class SparseLinear(nn.Module):
    """y = x W^T + b, W [out, in]. `weight` is a PackedWeight; `state_dict()` has the dense one, as of nn.Linear.

    W takes no gradient; x and the bias do. The bias is added after rounding, in the dtype of y.
    """

    bias: nn.Parameter | None

    def __init__(self, rows: int, cols: int, dtype: torch.dtype, bias: Tensor | None) -> None:
        """bias: [rows] or None; a Parameter stays the same object."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = cols, rows, dtype
        if bias is not None and bias.shape != (rows,):
            raise KernelError(f"the bias has shape {list(bias.shape)}, the matrix has {rows} rows")
        own = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", own)

    @property
    @abstractmethod
    def weight(self) -> PackedWeight:
        """W: shape, dtype and device at once, numbers when they are read."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """W as an ordinary tensor."""

    @abstractmethod
    def take(self, weight: Tensor) -> str | None:
        """Holds another W of the same shape from now on; what is wrong with it, or None."""

    @abstractmethod
    def _few(self, x: Tensor) -> Tensor:
        """x W^T by a kernel: 1 to 8 contiguous rows without gradient."""

    @abstractmethod
    def _many(self, x: Tensor) -> Tensor:
        """x W^T by torch's dense product."""

    def forward(self, x: Tensor) -> Tensor:
        x = checked(x, self.in_features, self.dtype)
        y = self._few(x.contiguous()) if few(x) else self._many(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _misshapen(self, weight: Tensor) -> str | None:
        shape = (self.out_features, self.in_features)
        return f"shape {list(weight.shape)}, the sparse module has {list(shape)}" if weight.shape != shape else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.dense_weight()
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
        take_state(prefix + "weight", self.take, state_dict, strict, missing_keys, unexpected_keys, error_msgs)


class PackedLinear(SparseLinear):
    """A SparseLinear that holds one packed tensor. The mask belongs to the module: W loaded later must be zero outside.

    A layout gives four functions: describe, pack, unpack and dense_view, the dense matrix as an operator.
    """

    packed: Tensor
    describe: Callable[[Tensor], Any]
    pack: Callable[[Tensor, Tensor, int], Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, int]]
    dense_view: Callable[[Tensor, int, int, torch.dtype], Tensor]

    def __init__(self, packed: Tensor, bias: Tensor | None = None) -> None:
        record = self.describe(packed)
        super().__init__(record.rows, record.cols, record.dtype, bias)
        self.register_buffer("packed", packed, persistent=False)

    @classmethod
    def packed_from(cls, weight: Tensor, mask: Tensor) -> Tensor:
        """W [out, in] under a bool mask of its shape, packed; W elsewhere is not looked at."""
        bits = bitmask.pack_bits(mask.cpu())
        return cls.pack(bits, bitmask.compress(weight.detach().cpu(), bits), weight.shape[1]).to(weight.device)

    @property
    def weight(self) -> PackedWeight:
        shape, packed = (self.out_features, self.in_features), self.packed
        read = lambda: self.dense_view(packed, *shape, self.dtype)
        return PackedWeight(shape, (shape[1], 1), self.dtype, packed.device, read)

    def dense_weight(self) -> Tensor:
        return self.dense_view(self.packed, self.out_features, self.in_features, self.dtype)

    def take(self, weight: Tensor) -> str | None:
        fault = self._misshapen(weight)
        if fault is not None:
            return fault
        bits, _, cols = self.unpack(self.packed)
        weight = weight.detach().to("cpu", self.dtype)
        values = bitmask.compress(weight, bits)
        if int(weight.count_nonzero()) != int(values.count_nonzero()):
            return "values that are not zero where the sparse module is pruned"
        self.packed = self.pack(bits, values, cols).to(self.packed.device)
        return None

    def _many(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return _DenseProduct.apply(x, self.packed, self.dense_view, *shape, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """`.to`, `.half` and the like: the packed bytes move, their values are cast. KernelError for float32."""
        wanted = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        if wanted is not self.dtype:
            bits, values, cols = self.unpack(self.packed)
            self.packed = self.pack(bits, values.to(wanted), cols).to(self.packed.device)
            self.dtype = wanted
        super()._apply(fn, recurse)
        return self


class ThresholdMixin(nn.Module):
    """A buffer `threshold`, float32 [in], which stays float32 when the module is cast."""

    threshold: Tensor

    def hold_threshold(self, threshold: Tensor, features: int) -> None:
        if threshold.shape != (features,):
            raise KernelError(f"the threshold has shape {list(threshold.shape)}, the matrix has {features} columns")
        self.register_buffer("threshold", threshold.detach().float().contiguous(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ThresholdMixin:
        exact = self.threshold
        super()._apply(fn, recurse)
        self.threshold = exact.to(self.threshold.device)
        return self


def take_state(
    key: str,
    take: Callable[[Tensor], str | None],
    state_dict: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Gives entry `key` to `take` and reports as nn.Module does what is missing or does not fit."""
    if key not in state_dict:
        if strict:
            missing_keys.append(key)
        return
    if key in unexpected_keys:
        unexpected_keys.remove(key)
    fault = take(state_dict[key])
    if fault is not None:
        error_msgs.append(f"{key}: {fault}")


class _DenseProduct(torch.autograd.Function):
    """x W^T with a dense W that lives only during the forward and during the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, view: Any, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.view, ctx.matrix = view, (rows, cols, dtype)
        return functional.linear(x, view(packed, rows, cols, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return gradient @ ctx.view(packed, *ctx.matrix), None, None, None, None, None
