"""A gated MLP on some of its neurons, against as many dense products as it has matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..memory import empty_weight
from ..neuron_mlp.dispatch import neuron_mlp
from .case import Case

SHARE, MUST = 0.4, 2.4  # of the neurons; speedup over three of the fastest dense products
_STEP = 2.0**-24  # of float32, half of it
_CHECKED_ROWS = 1024  # in float64 at a time


def mlp_cases(x: Tensor, weight: Tensor, generator: Generator) -> list[Case]:
    """The weight as gate [inter, hidden] where it has the shape of one: more rows than columns.

    up and the transposed down hold the same numbers in other rows, which is memory of their own.
    """
    neurons, hidden = weight.shape
    if neurons <= hidden:
        return []
    x = (x / hidden**0.5).to(x.dtype)  # float16 overflows otherwise
    up, down_t = _rolled(weight, 1), _rolled(weight, 2)
    active = torch.randperm(neurons, generator=generator)[: round(SHARE * neurons)].sort().values
    few = active.int()
    call = lambda: neuron_mlp(x, weight, up, down_t, few)
    inner, moved = _inner(x, weight[active], up[active])
    read = 3 * len(active) * hidden * weight.element_size()
    truth = down_t[active].t()
    return [Case(f"MLP, {SHARE:.0%} of neurons", call, read, inner, truth, must=MUST, products=3, moved=moved)]


def _rolled(weight: Tensor, rows: int) -> Tensor:
    return empty_weight(*weight.shape, dtype=weight.dtype).copy_(weight.roll(rows, 0))


def _inner(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(x gate^T) * (x up^T) in float64, and how far float32 may be from it.

    silu moves by at most 1.1 times as much as its argument; itself, product and rounding cost less than 16 steps.
    """
    (gates, gate_error), (ups, up_error) = _sums(x, gate), _sums(x, up)
    inner = F.silu(gates) * ups
    moved = 1.1 * gate_error * (ups.abs() + up_error) + F.silu(gates).abs() * up_error + 16 * _STEP * inner.abs()
    return inner, moved


def _sums(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T in float64, and what sums in float32 may lose of it."""
    x = x.double()
    parts = weight.split(_CHECKED_ROWS)
    sums = torch.cat([x @ part.double().t() for part in parts], 1)
    sizes = torch.cat([x.abs() @ part.double().abs().t() for part in parts], 1)
    return sums, (x.shape[-1] + 8) * _STEP * sizes
