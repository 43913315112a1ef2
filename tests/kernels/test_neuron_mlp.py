"""The gated MLP on some of its neurons: every tier against float64, exact on whole numbers; others are not read."""

from __future__ import annotations

import math

import pytest
import torch
from gemv_cases import BACKENDS, BATCHES, FLOATS, backend, bits_of, integers, normal, threads
from gemv_cases import poisoned_results as poisoned
from torch import Tensor

from gossamer.errors import KernelError
from gossamer.kernels.neuron_mlp.dispatch import ACTIVATIONS, neuron_mlp

# neurons x hidden
SHAPES = [(1, 1), (63, 1), (1, 63), (63, 100), (100, 63), (5, 4097), (300, 40), (0, 5), (5, 0), (40, 1100)]
SHARES = [0.0, 0.3, 0.5, 0.9, 1.0]
INF, NAN = float("inf"), float("nan")

EXACT = {
    "silu": lambda g: g / (1 + torch.exp(-g)),
    "gelu_tanh": lambda g: g / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
    "gelu": lambda g: g / 2 * (1 + torch.erf(g / math.sqrt(2))),
    "relu": lambda g: g.clamp(min=0),
}


def signs(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """-1, 0 and 1: even products of three of them, summed twice, stay whole numbers that float32 holds."""
    return integers(*shape, dtype=dtype, seed=seed, zeros=0.2).sign()


def chosen(neurons: int, share: float, seed: int = 0) -> Tensor:
    drawn = torch.rand(neurons, generator=torch.Generator().manual_seed(seed)) < share
    return drawn.nonzero().squeeze(1).int()


def matrices(neurons: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down_t = (normal(neurons, hidden, dtype=torch.float32, seed=seed) for seed in (1, 2, 3))
    size = hidden**-0.5
    return (gate * size).to(dtype), (up * size).to(dtype), down_t.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_whole_numbers_are_exact(name, dtype, monkeypatch):
    with backend(name), poisoned(monkeypatch):
        for index, (neurons, hidden) in enumerate(SHAPES):
            gate, up, down_t = (signs(neurons, hidden, dtype=dtype, seed=seed) for seed in (1, 2, 3))
            for batch, share in zip(BATCHES, SHARES[index % 5 :] + SHARES[: index % 5], strict=True):
                active, x = chosen(neurons, share), signs(batch, hidden, dtype=dtype, seed=batch + 4)
                rows = active.long()
                inner = (x.double() @ gate[rows].double().t()).clamp(min=0) * (x.double() @ up[rows].double().t())
                assert (inner.abs() @ down_t[rows].double().abs() < 2**24).all()
                wanted = (inner @ down_t[rows].double()).to(dtype)
                y = neuron_mlp(x, gate, up, down_t, active, "relu")
                assert torch.equal(y, wanted), (neurons, hidden, batch, share)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_within_the_rounding_of_float32(name, dtype, activation):
    """Errors of both sums go through the activation (slope at most 1.13) and the product into the third sum."""
    gate, up, down_t = matrices(301, 97, dtype)
    active, x = chosen(301, 0.6), normal(3, 97, dtype=dtype, seed=4)
    with backend(name):
        y = neuron_mlp(x, gate, up, down_t, active, activation).double()
    g_w, u_w, d_w = (matrix[active.long()].double() for matrix in (gate, up, down_t))
    wide, unit = x.double(), 2.0**-24
    g, u = wide @ g_w.t(), wide @ u_w.t()
    g_off, u_off = ((97 + 8) * unit * (wide.abs() @ matrix.abs().t()) for matrix in (g_w, u_w))
    a = EXACT[activation](g)
    a_off = 1.13 * g_off + 8 * unit * (a.abs() + g.abs())  # 1 + tanh and 1 + erf cancel for negative g
    h_off = a_off * (u.abs() + u_off) + a.abs() * u_off + unit * (a * u).abs()
    truth, size = (a * u) @ d_w, (a * u).abs() @ d_w.abs()
    allowed = h_off @ d_w.abs() + (len(active) + 8) * unit * size + torch.finfo(dtype).eps / 2 * truth.abs() * 1.001
    assert ((y - truth).abs() / allowed).max() <= 1.0
    assert (truth.abs() > 20 * allowed).float().mean() > 0.5  # the bound says something


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_same_bits_for_any_threads_and_any_company(name, dtype):
    gate, up, down_t = matrices(900, 515, dtype)
    active, x = chosen(900, 0.7), normal(8, 515, dtype=dtype, seed=6)
    with backend(name), threads(1):
        together = neuron_mlp(x, gate, up, down_t, active)
        alone = torch.cat([neuron_mlp(row[None], gate, up, down_t, active) for row in x])
    assert torch.equal(bits_of(alone), bits_of(together))
    for count in (2, 3, 4):
        with backend(name), threads(count):
            assert torch.equal(bits_of(neuron_mlp(x, gate, up, down_t, active)), bits_of(together)), count


@pytest.mark.parametrize("name", BACKENDS)
def test_other_neurons_are_not_read(name):
    gate, up, down_t = (signs(50, 33, dtype=torch.bfloat16, seed=seed) for seed in (1, 2, 3))
    active, x = chosen(50, 0.4), signs(3, 33, dtype=torch.bfloat16, seed=4)
    with backend(name):
        wanted = neuron_mlp(x, gate, up, down_t, active, "relu")
        assert wanted.abs().sum() > 0
        others = torch.ones(50, dtype=torch.bool)
        others[active.long()] = False
        for matrix in (gate, up, down_t):
            matrix[others] = NAN
        assert torch.equal(neuron_mlp(x, gate, up, down_t, active, "relu"), wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_infinity_and_nan_as_in_torch(name, activation):
    gate = torch.tensor([[1.0], [-1.0], [0.0]])
    one = torch.ones(1, dtype=torch.int32)
    with backend(name):
        for value in (INF, -INF, NAN, -0.0, 1e4, -1e4, 88.0, -90.0):
            for neuron in range(3):
                x, here = torch.tensor([[value]]), one * neuron
                y = neuron_mlp(x, gate, torch.zeros(3, 1) + 1, torch.ones(3, 1), here, activation)
                inner = ACTIVATIONS[activation](x * gate[neuron]) * x
                assert torch.allclose(y, inner, rtol=1e-5, atol=1e-30, equal_nan=True), (value, neuron)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_set_is_checked(name):
    gate, up, down_t = matrices(6, 4, torch.float32)
    x = torch.ones(1, 4)
    with backend(name):
        for wrong in ([-1, 2], [0, 6], [1, 1], [3, 2], [0, 5, 4, 5], [2**31 - 1], [-(2**31)]):
            with pytest.raises(KernelError, match="must rise from 0 to 5"):
                neuron_mlp(x, gate, up, down_t, torch.tensor(wrong, dtype=torch.int32))
        assert neuron_mlp(x, gate, up, down_t, torch.arange(6, dtype=torch.int32)).isfinite().all()
        assert neuron_mlp(x, gate, up, down_t, torch.zeros(0, dtype=torch.int32)).tolist() == [[0.0] * 4]


W, X, A = torch.ones(6, 4), torch.ones(2, 4), torch.arange(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.half(), W, W, W, A), "x is float16, the weight float32"),
        ((X, W.int(), W, W, A), "gate is int32, allowed"),
        ((X, W, W[:5], W, A), r"up is float32 \[5, 4\] on cpu, it must be as gate, float32 \[6, 4\]"),
        ((X, W, W, W.half(), A), "down_t is float16"),
        ((X, W, W, torch.ones(4, 6).t(), A), "down_t has shape"),
        ((X[:, :3], W, W, W, A), "last length must be 4"),
        ((torch.ones(9, 4), W, W, W, A), "9 rows"),
        ((X, W, W, W, A.long()), "active is int64 on cpu, it must be int32"),
        ((X, W, W, W, A[None]), r"active has shape \[1, 3\]"),
        ((X, W, W, W, torch.arange(6, dtype=torch.int32)[::2]), "contiguous"),
        ((X, W, W, W, A, "swish"), "activation is 'swish', allowed: silu, gelu_tanh, gelu, relu"),
        ((X.clone().requires_grad_(), W, W, W, A), "requires a gradient"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(KernelError, match=message):
        neuron_mlp(*arguments)


def test_as_torch_sees_it():
    """Schema, fake tensors, compilation."""
    gate, up, down_t = matrices(12, 10, torch.bfloat16)
    rest = (gate, up, down_t, chosen(12, 0.5), "gelu")
    for shape in ((1, 10), (2, 3, 10), (10,)):
        x = normal(*shape, dtype=torch.bfloat16, seed=1)
        torch.library.opcheck(torch.ops.gossamer.neuron_mlp.default, (x, *rest))
    layer = lambda x: neuron_mlp(x * 2, *rest) + 1
    x = normal(3, 10, dtype=torch.bfloat16, seed=2)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
