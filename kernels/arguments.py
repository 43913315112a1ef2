"""Checks that all operations share. They run on every call, so each is one attribute and one comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import KernelError

MAX_ROWS = 8
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of csrc/gemv.h


def check_rows(x: Tensor, cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Number of rows of x, [cols] or [..., cols] of 1 to 8 rows, contiguous, of `dtype`, on `device`.

    Raises KernelError with what came and what is allowed, and under autograd: there is no backward pass.
    """
    if x.dtype is not dtype:
        raise KernelError(f"x is {name(x.dtype)}, the weight {name(dtype)}; they must be equal")
    if x.device != device:
        raise KernelError(f"x is on {x.device}, the weight on {device}; they must be on the same device")
    shape = x.shape
    if not shape or shape[-1] != cols:
        raise KernelError(f"x has shape {list(shape)}, its last length must be {cols}")
    rows = 1
    for length in shape[:-1]:
        rows *= length
    if not 1 <= rows <= MAX_ROWS:
        raise KernelError(
            f"x has {rows} rows, 1 to {MAX_ROWS} are allowed", hint="use the dense weight for more rows, as in prefill"
        )
    if not x.is_contiguous():
        raise KernelError(f"x has strides {x.stride()}, it must be contiguous", hint="call x.contiguous()")
    if x.requires_grad and torch.is_grad_enabled():
        raise KernelError(
            "x requires a gradient, and sparse kernels have none",
            hint="run under torch.no_grad(), or use the dense weight for training",
        )
    check_memory(x)
    return rows


def check_weight(weight: Tensor, what: str) -> int:
    """Code of the dtype of a dense weight [a, b], float32, bfloat16 or float16, contiguous."""
    code = CODES.get(weight.dtype)
    if code is None:
        raise KernelError(f"{what} is {name(weight.dtype)}, allowed: {', '.join(map(name, CODES))}")
    if weight.dim() != 2 or not weight.is_contiguous():
        raise KernelError(
            f"{what} has shape {list(weight.shape)} and strides {weight.stride()}, it must be a contiguous matrix"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise KernelError(f"{what} requires a gradient, and sparse kernels have none", hint="run under torch.no_grad()")
    check_memory(weight)
    return code


def check_memory(*tensors: Tensor) -> None:
    """KernelError for a tensor whose numbers lie elsewhere, like the weight of a sparse module: it has no address."""
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel():
            raise KernelError(
                f"a {type(tensor).__name__} of shape {list(tensor.shape)} has no memory of its own",
                hint="add 0 to it: that makes an ordinary tensor",
            )


def check_threshold(threshold: Tensor, channels: int, device: torch.device, what: str = "threshold") -> None:
    """Raises KernelError unless threshold, or `what`, is float32 [channels] on `device`, contiguous."""
    if threshold.dtype is not torch.float32 or threshold.device != device:
        raise KernelError(f"{what} is {name(threshold.dtype)} on {threshold.device}, it must be float32 on {device}")
    if threshold.dim() != 1 or threshold.shape[0] != channels or not threshold.is_contiguous():
        raise KernelError(f"{what} has shape {list(threshold.shape)}, it must be contiguous [{channels}]")


def check_bias(bias: Tensor | None, outputs: int, x: Tensor) -> None:
    """Raises KernelError unless bias is None or [outputs], of x's dtype, on x's device, contiguous."""
    if bias is None:
        return
    if bias.dtype is not x.dtype or bias.device != x.device:
        raise KernelError(f"bias is {name(bias.dtype)} on {bias.device}, it must be {name(x.dtype)} on {x.device}")
    if bias.dim() != 1 or bias.shape[0] != outputs or not bias.is_contiguous():
        raise KernelError(f"bias has shape {list(bias.shape)}, it must be contiguous [{outputs}]")


def name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
