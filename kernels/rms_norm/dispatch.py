"""Root mean square norm: the public name. Compiled code on the CPU, plain torch elsewhere or without it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import CODES, check_memory, name
from ..backend import choose
from ..library import operator
from ..tier import current
from . import reference


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)) over the last axis: like x.

    x [..., n] and weight [n]: float32, bfloat16 or float16, of one dtype, contiguous. Sums are float32; the quotient is
    rounded to the dtype before the weight multiplies it, as in Llama's norm. A row has the same bits alone or among
    others. Raises KernelError otherwise and where a gradient would be needed.
    """
    if torch.compiler.is_compiling():
        return _operator(x, weight, epsilon)
    return _run(x, weight, epsilon)  # the way through torch takes as long again


def _run(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    code = CODES.get(x.dtype)
    if code is None:
        raise KernelError(f"x is {name(x.dtype)}, allowed: {', '.join(map(name, CODES))}")
    if weight.dtype is not x.dtype or weight.device != x.device:
        raise KernelError(
            f"x is {name(x.dtype)} on {x.device}, the weight {name(weight.dtype)} on {weight.device}; "
            "they must be equal"
        )
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.shape[0] or not weight.shape[0]:
        raise KernelError(
            f"x has shape {list(x.shape)}, the weight {list(weight.shape)}; the last lengths must be equal"
        )
    if not x.is_contiguous() or not weight.is_contiguous():
        raise KernelError(f"x has strides {x.stride()}, the weight {weight.stride()}; both must be contiguous")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise KernelError("a gradient is required, and this norm has none", hint="run under torch.no_grad()")
    check_memory(x, weight)
    tier = current() if x.is_cpu and choose("cpu") == "cpu" else None
    if tier is None:
        return reference.rms_norm(x, weight, epsilon)
    y, cols = torch.empty_like(x), weight.shape[0]
    tier.module.rms_norm(code, x.data_ptr(), weight.data_ptr(), x.numel() // cols, cols, epsilon, y.data_ptr())
    return y


def _fake(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


_operator = operator("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor", _run, _fake)
