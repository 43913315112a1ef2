"""The result of `neuron_mlp` in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def neuron_mlp(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, active: Tensor, activation: str) -> Tensor:
    """y = sum over i in active of h_i down_t[i], h_i = act(x gate[i]) (x up[i]), in float32, rounded once at the end.

    The intermediate h is not rounded to x's dtype, so y is nearer to the exact sum than the three layers one by one.
    """
    chosen = active.long()
    wide = x.float()
    inner = ACTIVATIONS[activation](wide @ gate[chosen].float().t()) * (wide @ up[chosen].float().t())
    return (inner @ down_t[chosen].float()).to(x.dtype)


def rises(active: Tensor, neurons: int) -> bool:
    """Whether active [n] rises strictly from 0 on and stays below `neurons`."""
    if active.numel() == 0:
        return True
    inside = bool(active[0] >= 0) and bool(active[-1] < neurons)
    return inside and bool((active.diff() > 0).all())
