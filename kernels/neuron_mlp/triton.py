"""`neuron_mlp` for GPUs: gate, up and activation of a list of neurons in one launch, then their rows of down.

`dispatch` has checked the arguments. Numbers in the list that are no neurons add nothing; no address follows from them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..channel_gemv.triton import add_rows
from ..gpu import add_product, fold, on_device, warps
from ..gpu_plan import power_of_two

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
INPUTS = 1024  # of a step: 8 of each of 128 threads


@triton.jit
def activate(z: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    if NAME == "silu":
        return z / (1.0 + tl.exp(-z))
    elif NAME == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return z * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    else:
        return tl.where(z <= 0, 0.0, z)


@triton.jit
def _gate_up(
    x: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    active: tl.tensor,
    factors: tl.tensor,
    hidden: tl.tensor,
    neurons: tl.tensor,
    batch: tl.tensor,
    ACTIVATION: tl.constexpr,
    BATCH: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    """factors float32 [batch, n]: activation(gate x) * (up x) of the neuron at one position of the list."""
    position, n = tl.program_id(0), tl.num_programs(0)
    neuron = tl.load(active + position)
    length = tl.where((neuron >= 0) & (neuron < neurons), hidden, 0)
    line = neuron.to(tl.int64) * hidden
    b = tl.arange(0, BATCH)
    gates = tl.zeros((BATCH, INPUTS), tl.float32)
    ups = gates
    for first in range(0, hidden, INPUTS):
        column = first + tl.arange(0, INPUTS)[None, :]
        inside = column < length
        one = tl.load(gate + line + column, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(up + line + column, mask=inside, other=0.0).to(tl.float32)
        wanted = (b < batch)[:, None] & inside
        factor = tl.load(x + b[:, None] * hidden + column, mask=wanted, other=0.0).to(tl.float32)
        gates = add_product(gates, one, factor)
        ups = add_product(ups, other, factor)
    z = tl.reshape(fold(gates, BATCH, INPUTS, 1), (BATCH,))
    h = activate(z, ACTIVATION) * tl.reshape(fold(ups, BATCH, INPUTS, 1), (BATCH,))
    tl.store(factors + b * n + position, h, mask=b < batch)


def neuron_mlp(
    x: Tensor, batch: int, gate: Tensor, up: Tensor, down_t: Tensor, active: Tensor, activation: str = "silu"
) -> Tensor:
    """x [..., hidden] through the `active` neurons (int32 [n]) of a gated MLP: [..., hidden] in x's dtype.

    gate, up, down_t: [inter, hidden]. Sums, activation and its products stay in float32, rounded once at the end. The
    same bits for a row alone or among others.
    """
    y = x.new_empty((*x.shape[:-1], down_t.shape[1]))
    if not y.numel():
        return y
    n, hidden = active.numel(), gate.shape[1]
    if not n:
        return y.zero_()
    factors = x.new_empty(batch, n, dtype=torch.float32)
    with on_device(x):
        _gate_up[(n,)](
            x,
            gate,
            up,
            active,
            factors,
            hidden,
            gate.shape[0],
            batch,
            ACTIVATION=activation,
            BATCH=power_of_two(batch),
            INPUTS=min(INPUTS, power_of_two(hidden)),
            num_warps=warps(batch),
        )
        return add_rows(active, factors, None, down_t, y)
