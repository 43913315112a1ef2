"""What linear layers with packed weights share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import KernelError
from ..arguments import name

# (packed, rows, cols, dtype) -> the dense matrix
Dense = Callable[[Tensor, int, int, torch.dtype], Tensor]


def own_bias(bias: Tensor | None, rows: int) -> nn.Parameter | None:
    """The bias as a parameter; one that is a parameter stays the same object. Raises KernelError for another shape."""
    if bias is not None and bias.shape != (rows,):
        raise KernelError(f"the bias has shape {list(bias.shape)}, the matrix has {rows} rows")
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


def checked_input(x: Tensor, dtype: torch.dtype, cols: int) -> Tensor:
    """x, cast under autocast. Raises KernelError unless it is [..., cols] of the dtype."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(dtype)
    if x.dtype is not dtype:
        raise KernelError(f"x is {name(x.dtype)}, the weight {name(dtype)}; they must be equal")
    if not x.dim() or x.shape[-1] != cols:
        raise KernelError(f"x has shape {list(x.shape)}, its last length must be {cols}")
    return x


def load_weight(
    key: str,
    take: Callable[[Tensor], str | None],
    state_dict: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """The part of `_load_from_state_dict` for a dense weight, no parameter: `take` says what is wrong with it."""
    if key not in state_dict:
        if strict:
            missing_keys.append(key)
        return
    if key in unexpected_keys:
        unexpected_keys.remove(key)
    fault = take(state_dict[key])
    if fault is not None:
        error_msgs.append(f"{key}: {fault}")


class DenseProduct(torch.autograd.Function):
    """x W^T with a dense W that lives only during the forward and during the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, dense: Dense, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.dense, ctx.matrix = dense, (rows, cols, dtype)
        return functional.linear(x, dense(packed, rows, cols, dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return gradient @ ctx.dense(packed, *ctx.matrix), None, None, None, None, None
