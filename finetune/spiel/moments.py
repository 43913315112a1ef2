"""One update of a layer's values by their gradients: Adam with an age per entry, and SM3.

Adam's moments are kept in float32 ("m", "v") or in 8 bits ("m8", "r8" for the root of v, and their scales).

Adam: Kingma and Ba, 2015, with decoupled weight decay (Loshchilov and Hutter, 2019), which for a delta is a pull
towards the pretrained weight. SM3: Anil et al., "Memory-Efficient Adaptive Optimization", 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .eightbit import decode, encode

SM3_EPS = 1e-8


def start_adam(values: Tensor, done: int, *, eight_bit: bool = False) -> dict[str, Tensor]:
    """State [K] of entries that are born after `done` updates: moments, birth as the number of updates."""
    zeros = torch.zeros_like(values, dtype=torch.float32)
    state = {"birth": torch.full(values.shape, done, dtype=torch.int32, device=values.device)}
    if eight_bit:
        state["m8"], state["m_scale"] = encode(zeros, signed=True)
        state["r8"], state["r_scale"] = encode(zeros, signed=False)
    else:
        state |= {"m": zeros, "v": zeros.clone()}
    return state


def read_adam(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both moments in float32 [K]: those of the state, or what its codes stand for."""
    if "m" in state:
        return state["m"], state["v"]
    m = decode(state["m8"], state["m_scale"], signed=True)
    return m, decode(state["r8"], state["r_scale"], signed=False).square_()


def write_adam(state: dict[str, Tensor], m: Tensor, v: Tensor) -> None:
    """Both moments back into the state, in its own precision."""
    if "m" in state:
        state["m"], state["v"] = m, v
        return
    state["m8"], state["m_scale"] = encode(m, signed=True)
    state["r8"], state["r_scale"] = encode(v.sqrt(), signed=False)


def step_adam(values: Tensor, gradient: Tensor, state: dict[str, Tensor], done: int, group: dict[str, Any]) -> None:
    """Update number `done` (from 1) in place; every entry's bias is corrected by its own age."""
    beta1, beta2 = group["betas"]
    gradient = gradient.to(torch.float32)
    m, v = read_adam(state)
    m.mul_(beta1).add_(gradient, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    write_adam(state, m, v)
    age = done - state["birth"]
    m = m / _corrections(beta1, age, done)
    v = v / _corrections(beta2, age, done)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    values.add_((m / (v.sqrt() + group["eps"])).to(values.dtype), alpha=-group["lr"])


def _corrections(beta: float, age: Tensor, done: int) -> Tensor:
    """1 - beta^age, ages of 1 to `done`: powers once per age where that is fewer than once per entry."""
    if done >= age.numel():
        return 1 - torch.pow(beta, age.to(torch.float32))
    powers = torch.pow(beta, torch.arange(done + 1, dtype=torch.float32, device=age.device))
    return 1 - powers[age]


def start_sm3(rows: int, cols: int, device: torch.device) -> dict[str, Tensor]:
    """One accumulator per row and per column, float32."""
    return {"row": torch.zeros(rows, device=device), "col": torch.zeros(cols, device=device)}


def step_sm3(
    values: Tensor, gradient: Tensor, state: dict[str, Tensor], row: Tensor, column: Tensor, group: dict[str, Any]
) -> None:
    """Update in place of entries at (row, column), int64 [K]: nu = min(row, column accumulator) + g^2."""
    gradient = gradient.to(torch.float32)
    nu = torch.minimum(state["row"][row], state["col"][column]) + gradient * gradient
    state["row"].scatter_reduce_(0, row, nu, "amax")
    state["col"].scatter_reduce_(0, column, nu, "amax")
    values.mul_(1 - group["lr"] * group["weight_decay"])
    values.add_((gradient * (nu + SM3_EPS).rsqrt()).to(values.dtype), alpha=-group["lr"])
