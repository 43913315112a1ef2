"""`neuron_mlp` in C++. `dispatch` has checked the arguments, except the order of `active`, which is checked there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tier import Tier

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}  # enum Activation of csrc/neuron.h


def neuron_mlp(
    tier: Tier,
    x: Tensor,
    rows: int,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    active: Tensor,
    activation: str,
    code: int,
) -> Tensor | None:
    """None when `active` does not rise within the neurons."""
    neurons, hidden = gate.shape
    y = x.new_empty(x.shape)
    done = tier.module.neuron_mlp(
        tier.address,
        code,
        x.data_ptr(),
        rows,
        gate.data_ptr(),
        up.data_ptr(),
        down_t.data_ptr(),
        neurons,
        hidden,
        ACTIVATIONS[activation],
        active.data_ptr(),
        active.numel(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y if done else None
