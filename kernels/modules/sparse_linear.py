"""What linear layers with sparse products share: when the kernel runs, when the dense view, how they look from outside.

A subclass says how its matrix is multiplied and expanded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import KernelError
from ..arguments import MAX_ROWS, name
from .siblings import Siblings, wants_gradient
from .state import lazy_state, take_state
from .weight import PackedWeight

PREFILL = ("streamed", "cached")

_dense: ContextVar[bool] = ContextVar("dense_products", default=False)


class SparseLinear(nn.Module):
    """y = x W^T + b for a W [out, in] of which only mask and kept values are held.

    x [..., in] and y [..., out] in `dtype`. 1 to 8 rows without gradient go through the kernel; up to `few_rows` in
    groups of eight; others through the dense view of W, which is freed after the product (prefill "streamed") or kept
    ("cached"), and made again by the backward pass. W takes no gradient; x and the bias do. The bias is added after
    rounding, in the dtype of y.

    `weight` is a PackedWeight. `state_dict()` has the dense `weight`, as of nn.Linear. With `transposed`, both are
    [in, out], as in transformers' Conv1D.
    """

    packed: Tensor
    bias: nn.Parameter | None
    reference = False  # every product in plain torch, as its definition says
    few_rows = 32  # beyond, a dense product is faster, although the dense view has to be made first

    def __init__(
        self,
        packed: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None,
        *,
        transposed: bool = False,
        prefill: str = "streamed",
    ) -> None:
        """packed: [out, in] = `shape` in a layout of the kernels. bias: [out]; a Parameter stays the same object."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype, self.transposed, self.prefill = dtype, transposed, prefill
        self.siblings: Siblings | None = None
        self.alone = False
        self._view: tuple[Tensor, Tensor] | None = None
        self.register_buffer("packed", packed, persistent=False)
        if bias is not None and bias.shape != (self.out_features,):
            raise KernelError(f"the bias has shape {list(bias.shape)}, the matrix has {self.out_features} rows")
        own = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", own)

    @abstractmethod
    def gemv(self, x: Tensor) -> Tensor:
        """x of 1 to 8 rows times W^T, as an operator of torch."""

    @abstractmethod
    def expand(self, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """The dense W, as an operator of torch."""

    @abstractmethod
    def bits(self) -> Tensor:
        """The mask as packed rows, uint8 [out, ceil(in / 8)]."""

    @abstractmethod
    def take(self, weight: Tensor) -> str | None:
        """Takes over a dense `weight`, or says what is wrong with it."""

    def few_product(self, x: Tensor) -> Tensor:
        """`gemv` where nothing is compiled; layers that can be computed in one call with others do that here."""
        return self.gemv(x)

    def seen(self, x: Tensor) -> Tensor:
        """The x whose dense product is what the kernel computes."""
        return x

    @property
    def weight(self) -> PackedWeight:
        """W, or its transpose if `transposed`: shape, dtype and device at once, numbers when they are read."""
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        return PackedWeight(shape, (shape[1], 1), self.dtype, self.packed.device, self.dense_weight)

    def matrix(self) -> Tensor:
        """The packed tensor, as the kernels take it."""
        return self.packed

    def dense_weight(self) -> Tensor:
        """`weight` as an ordinary tensor."""
        weight = self._expanded()
        return (weight.t() if self.transposed else weight).contiguous()

    def expanded(self, transposed_class: type[nn.Module]) -> nn.Module:
        """The ordinary layer with the same dense weight and bias: nn.Linear or, if transposed, the given class.

        `transposed_class(out, in)` makes a layer whose weight is [in, out], as transformers' Conv1D does.
        """
        with torch.device("meta"):
            if self.transposed:
                layer = transposed_class(self.out_features, self.in_features)
            else:
                layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight = nn.Parameter(self.dense_weight())
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(checked(x, self.in_features, self.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not 1 <= rows <= self.few_rows or wants_gradient(x):
            return self._dense_product(x)
        if torch.compiler.is_compiling():
            return self.gemv(x.contiguous()) if rows <= MAX_ROWS else self._dense_product(x)
        if _dense.get() or self.reference:
            return self._dense_product(self.seen(x))
        x = x.contiguous()
        if rows <= MAX_ROWS:
            return self.few_product(x)
        parts = [self.gemv(part) for part in x.view(rows, -1).split(MAX_ROWS)]
        return torch.cat(parts).view(*x.shape[:-1], self.out_features)

    def _dense_product(self, x: Tensor) -> Tensor:
        if self.reference and not wants_gradient(x):
            return (x.float() @ self._expanded().float().t()).to(x.dtype)
        if self.prefill == "cached" and not torch.compiler.is_compiling() and not wants_gradient(x):
            if self._view is None or self._view[0] is not self.packed:
                self._view = self.packed, self._expanded()
            return functional.linear(x, self._view[1])
        return _DenseProduct.apply(x, self.packed, self.expand, self.out_features, self.in_features, self.dtype)

    def _expanded(self) -> Tensor:
        return self.expand(self.packed, self.out_features, self.in_features, self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        self._view = None
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if lazy_state() else self.dense_weight()
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
        key, wanted = prefix + "weight", self.weight.shape
        take_state(key, wanted, self.take, state_dict, strict, missing_keys, unexpected_keys, error_msgs)


def checked(x: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """x [..., features] in `dtype`, cast under autocast only; KernelError for anything else."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(dtype)
    if x.dtype is not dtype:
        raise KernelError(f"x is {name(x.dtype)}, the weight {name(dtype)}; they must be equal")
    if not x.dim() or x.shape[-1] != features:
        raise KernelError(f"x has shape {list(x.shape)}, its last length must be {features}")
    return x


class _DenseProduct(torch.autograd.Function):
    """x W^T with a dense W that lives only during the forward and during the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, expand: Any, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.expand, ctx.matrix = expand, (rows, cols, dtype)
        return functional.linear(x, expand(packed, rows, cols, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return gradient @ ctx.expand(packed, *ctx.matrix), None, None, None, None, None


@contextmanager
def dense_products() -> Iterator[None]:
    """Inside the block, every product of this thread goes through the dense view: what the kernels are checked with."""
    token = _dense.set(True)
    try:
        yield
    finally:
        _dense.reset(token)


def dense_only() -> bool:
    """Whether `dense_products` is in force."""
    return _dense.get()
