"""A gated MLP on a subset of its neurons: the public name. Compiled code on the CPU, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_rows, check_weight, name
from ..backend import choose
from ..library import operator
from ..tier import current
from . import cpu, reference
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "neuron_mlp"]


def neuron_mlp(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, active: Tensor, activation: str = "silu") -> Tensor:
    """y = sum over i in active of h_i down_t[i], h_i = act(x gate[i]) (x up[i]): [..., hidden] in x's dtype.

    x [..., hidden], 1 to 8 rows; gate, up and down_t (the down projection transposed) [inter, hidden]; all float32,
    bfloat16 or float16, of one dtype, contiguous. active: int32 [n], rising, each neuron at most once. activation: a
    key of ACTIVATIONS. Everything in float32, h included, and rounded once. Rows of other neurons are not read. The
    same bits for any number of threads, and for a row alone or among others. Raises KernelError for what does not fit,
    and where a gradient would be needed.

    Infinities and NaN behave as in torch: silu and gelu of minus infinity are NaN.
    """
    return _operator(x, gate, up, down_t, active, activation)


def _run(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, active: Tensor, activation: str = "silu") -> Tensor:
    code = check_weight(gate, "gate")
    rows = check_rows(x, gate.shape[1], gate.dtype, gate.device)
    for what, weight in (("up", up), ("down_t", down_t)):
        check_weight(weight, what)
        if weight.shape != gate.shape or weight.dtype is not gate.dtype or weight.device != gate.device:
            raise KernelError(
                f"{what} is {name(weight.dtype)} {list(weight.shape)} on {weight.device}, it must be as gate, "
                f"{name(gate.dtype)} {list(gate.shape)} on {gate.device}"
            )
    if active.dtype is not torch.int32 or active.device != x.device:
        raise KernelError(f"active is {name(active.dtype)} on {active.device}, it must be int32 on {x.device}")
    if active.dim() != 1 or not active.is_contiguous():
        raise KernelError(f"active has shape {list(active.shape)}, it must be contiguous [n]")
    if activation not in ACTIVATIONS:
        raise KernelError(f"activation is {activation!r}, allowed: {', '.join(ACTIVATIONS)}")
    which = choose(x.device.type)
    if which == "triton":
        from . import triton

        return triton.neuron_mlp(x, rows, gate, up, down_t, active, activation)
    tier = current() if which == "cpu" else None
    y = None
    if tier is not None:
        y = cpu.neuron_mlp(tier, x, rows, gate, up, down_t, active, activation, code)
    elif reference.rises(active, gate.shape[0]):
        y = reference.neuron_mlp(x, gate, up, down_t, active, activation)
    if y is None:
        raise KernelError(
            f"active [{active.numel()}] must rise from 0 to {gate.shape[0] - 1}, each neuron at most once",
            hint="use active.unique().int()",
        )
    return y


def _fake(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, active: Tensor, activation: str = "silu") -> Tensor:
    return x.new_empty(x.shape)


_operator = operator(
    'neuron_mlp(Tensor x, Tensor gate, Tensor up, Tensor down_t, Tensor active, str activation="silu") -> Tensor',
    _run,
    _fake,
)
