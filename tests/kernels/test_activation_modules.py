"""Layers that skip inputs or neurons, against torch's dense ones: products, gradients, casts, moves, state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
from gemv_cases import FLOATS, HALVES, exact, integers
from torch import Tensor, nn

from gossamer.errors import KernelError
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.dual_gemv.dispatch import unpack
from gossamer.kernels.modules.channel_linear import ChannelSparseLinear
from gossamer.kernels.modules.dual_linear import DualSparseLinear
from gossamer.kernels.modules.neuron_mlp import NeuronSubsetMLP
from gossamer.kernels.modules.sparse_linear import SparseLinear, dense_products
from gossamer.kernels.neuron_mlp.dispatch import neuron_mlp

OUT, IN = 137, 70
FEW = [(IN,), (1, IN), (8, IN), (2, 4, IN)]
MANY = [(9, IN), (3, 11, IN), (0, IN), (2, 0, IN)]
KINDS = ["channel", "dual"]


def mask_of() -> Tensor:
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(0)) >= 0.5


THRESHOLD = torch.rand(IN, generator=torch.Generator().manual_seed(1)) * 6


def layers(kind: str, dtype: torch.dtype = torch.bfloat16, *, bias: bool = True) -> tuple[SparseLinear, nn.Linear]:
    """The same matrix of small whole numbers twice."""
    full, mask = integers(OUT, IN, dtype=dtype, seed=1), mask_of()
    plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(full * mask)
    if bias:
        plain.bias.copy_(integers(1, OUT, dtype=dtype, seed=2)[0])
    own = plain.bias.clone() if bias else None
    if kind == "channel":
        return ChannelSparseLinear.from_dense(plain.weight, THRESHOLD.clone(), own), plain
    return DualSparseLinear.from_dense(full, mask, THRESHOLD.clone(), own), plain


def x_of(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> Tensor:
    return integers(*shape, dtype=dtype, seed=seed) if 0 not in shape else torch.empty(shape, dtype=dtype)


def skipped(x: Tensor) -> Tensor:
    return torch.where(x.float().abs() > THRESHOLD, x, torch.zeros_like(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"), [*(("channel", dtype) for dtype in FLOATS), *(("dual", dtype) for dtype in HALVES)]
)
def test_few_rows_skip_and_many_are_dense(kind, dtype, bias):
    sparse, plain = layers(kind, dtype, bias=bias)
    add = 0 if plain.bias is None else plain.bias
    for shape in FEW:
        x = x_of(*shape, dtype=dtype)
        assert not torch.equal(skipped(x), x)
        assert torch.equal(sparse(x), exact(skipped(x), plain.weight) + add), shape
    for shape in MANY:
        x = x_of(*shape, dtype=dtype)
        assert torch.equal(sparse(x), exact(x, plain.weight) + add), shape


@pytest.mark.parametrize("kind", KINDS)
def test_rows_apart_in_memory_and_autocast(kind):
    sparse, plain = layers(kind, bias=False)
    x = x_of(4, 2 * IN)[:, ::2]
    assert not x.is_contiguous()
    assert torch.equal(sparse(x), exact(skipped(x), plain.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(x.float()), exact(skipped(x), plain.weight))


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_layer(kind, rows):
    sparse, plain = layers(kind)
    results = []
    for layer in (sparse, plain):
        layer.bias.requires_grad_(True)
        x = x_of(rows, IN).requires_grad_(True)
        layer(x).backward(integers(rows, OUT, dtype=torch.bfloat16, seed=7))
        results.append((x.grad, layer.bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(kind, rows):
    sparse, plain = layers(kind)
    for shape, dtype in (((IN,), torch.float64), ((IN - 1,), torch.bfloat16)):
        with pytest.raises(KernelError, match="x "):
            sparse(torch.zeros(rows, *shape, dtype=dtype))
    with pytest.raises(KernelError, match="bias"):
        type(sparse)(sparse.packed, THRESHOLD, torch.zeros(OUT + 1))
    with pytest.raises(KernelError, match=r"threshold has shape \[69\], the matrix has 70 columns"):
        type(sparse)(sparse.packed, THRESHOLD[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_one_threshold_for_all(kind):
    sparse, plain = layers(kind, bias=False)
    twin, x = copy.deepcopy(sparse), x_of(2, IN)
    sparse.threshold.fill_(100.0)
    assert torch.equal(sparse(x), torch.zeros(2, OUT, dtype=torch.bfloat16))
    assert torch.equal(twin(x), exact(skipped(x), plain.weight))
    rest = (mask_of(),) if kind == "dual" else ()
    other = type(sparse).from_dense(plain.weight, *rest, torch.tensor(3.0))
    assert torch.equal(other(x), exact(torch.where(x.abs() > 3, x, 0 * x), plain.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_leaves_thresholds_exact(kind):
    sparse, plain = layers(kind)
    cast = nn.Sequential(sparse).half()[0]
    assert torch.equal(cast.threshold, THRESHOLD)
    x = x_of(2, IN, dtype=torch.float16)
    assert torch.equal(cast(x), exact(skipped(x), plain.weight.half()) + plain.bias.half())
    assert cast.weight.dtype is torch.float16
    if kind == "dual":
        assert torch.equal(unpack(cast.packed)[0], bitmask.pack_bits(mask_of()))
        with pytest.raises(KernelError, match="float32"):
            cast.float()
    assert {tensor.device.type for tensor in cast.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_the_dense_layers(kind):
    sparse, plain = layers(kind)
    state = sparse.state_dict()
    assert list(state) == ["weight", "bias"]
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_loaded(kind, assign):
    sparse, plain = layers(kind)
    other = {"weight": plain.weight * 2, "bias": plain.bias + 1}
    holder, x = nn.ModuleDict({"layer": sparse}), x_of(2, IN)
    sparse(x)
    holder.load_state_dict({f"layer.{name}": tensor for name, tensor in other.items()}, assign=assign)
    assert torch.equal(sparse(x), exact(skipped(x), other["weight"]) + other["bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_does_not_fit_is_refused(kind):
    sparse, plain = layers(kind, bias=False)
    states = [
        ({"weight": plain.weight[:, 1:]}, "shape"),
        ({}, "Missing key"),
        ({"weight": plain.weight, "other": plain.weight}, "Unexpected key"),
    ]
    if kind == "dual":
        states.append(({"weight": torch.ones(OUT, IN, dtype=torch.bfloat16)}, "not zero where"))
    for state, message in states:
        with pytest.raises(RuntimeError, match=message):
            copy.deepcopy(sparse).load_state_dict(state)
    assert sparse.load_state_dict({}, strict=False).missing_keys == ["weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_can_be_asked_and_read_but_not_written(kind):
    sparse, plain = layers(kind, bias=False)
    asked = sparse.weight
    assert (asked.shape, asked.dtype, asked.stride()) == (plain.weight.shape, torch.bfloat16, plain.weight.stride())
    assert repr(asked) == f"PackedWeight(shape=[{OUT}, {IN}], dtype=bfloat16, device=cpu)"
    x = x_of(3, IN)
    assert torch.equal(nn.functional.linear(x, asked), plain(x))
    assert torch.equal(asked + 0, plain.weight)
    for write in (lambda w: w.add_(1), lambda w: w.data.mul_(2), lambda w: w[3].zero_(), lambda w: w.t().fill_(1)):
        with pytest.raises(KernelError, match="in place"):
            write(sparse.weight)
    assert torch.equal(sparse.weight + 0, plain.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_without_kernels_skips_the_same_inputs(kind):
    sparse, plain = layers(kind, bias=False)
    x = x_of(4, IN)
    with dense_products():
        assert torch.equal(sparse(x), exact(skipped(x), plain.weight))
    sparse.reference = True
    assert torch.equal(sparse(x), exact(skipped(x), plain.weight))


def test_layers_with_one_input_keep_their_own_thresholds():
    for kind in KINDS:
        first, plain = layers(kind, bias=False)
        second = copy.deepcopy(first)
        second.threshold.zero_()
        x = x_of(1, IN)
        for _ in range(3):
            assert torch.equal(first(x), exact(skipped(x), plain.weight))
            assert torch.equal(second(x), exact(x, plain.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_transposed_looks_like_a_conv1d(kind):
    sparse, plain = layers(kind, bias=False)
    turned = type(sparse)(sparse.packed, THRESHOLD, transposed=True)
    x = x_of(2, IN)
    assert torch.equal(turned.state_dict()["weight"], plain.weight.t())
    turned.load_state_dict({"weight": plain.weight.t() * 2})
    assert torch.equal(turned(x), exact(skipped(x), plain.weight * 2))
    assert torch.equal(sparse(x), exact(skipped(x), plain.weight))


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole_and_equal(kind, rows):
    sparse, _ = layers(kind)
    x = x_of(rows, IN)
    with torch.no_grad():
        assert torch.equal(torch.compile(sparse, fullgraph=True, backend="aot_eager")(x), sparse(x))


# ---- the gated MLP ----

HIDDEN, NEURONS = 24, 90


def mlp(dtype: torch.dtype = torch.bfloat16, activation: str = "silu") -> tuple[NeuronSubsetMLP, list[Tensor]]:
    """With the dense gate, up and down it was made of."""
    signs = [integers(NEURONS, HIDDEN, dtype=dtype, seed=seed, zeros=0.5).sign() for seed in (1, 2, 3)]
    weights = [signs[0], signs[1], signs[2].t().contiguous()]
    return NeuronSubsetMLP.from_dense(*weights, activation), weights


def dense_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    linear = nn.functional.linear
    return linear(nn.functional.silu(linear(x, gate)) * linear(x, up), down)


CHOSEN = torch.arange(0, NEURONS, 3)


def test_few_rows_take_the_set_and_others_are_dense():
    module, weights = mlp()
    x, many = x_of(2, 2, HIDDEN), x_of(9, HIDDEN)
    assert torch.equal(module(x), dense_mlp(x, *weights))
    module.set_active(CHOSEN.flip(0).repeat(2))
    wanted = neuron_mlp(x, module.gate, module.up, module.down_t, CHOSEN.int())
    assert not torch.equal(wanted, dense_mlp(x, *weights))
    assert torch.equal(module(x), wanted)
    assert torch.equal(module(many), dense_mlp(many, *weights))
    assert torch.equal(module(many, CHOSEN.int()), dense_mlp(many, *weights))
    one = torch.tensor([5], dtype=torch.int32)
    assert torch.equal(module(x, one), neuron_mlp(x, module.gate, module.up, module.down_t, one))
    assert torch.equal(module(x), wanted)
    assert "active=30" in repr(module)
    module.set_active(None)
    assert torch.equal(module(x), dense_mlp(x, *weights))


def test_a_gradient_takes_all_neurons():
    module, weights = mlp(torch.float32)
    module.set_active(CHOSEN)
    gradients = []
    for call in (module, lambda x: dense_mlp(x, *weights)):
        x = x_of(2, HIDDEN, dtype=torch.float32).requires_grad_(True)
        call(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (torch.tensor([-1, 3]), "active reaches from -1 to 3 of 90"),
        (torch.tensor([0, NEURONS]), "from 0 to 90 of 90"),
        (torch.ones(NEURONS, dtype=torch.bool), "it must be integers"),
        (torch.zeros(2, 2).int(), r"\[2, 2\], it must be integers"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(active, message):
    with pytest.raises(KernelError, match=message):
        mlp()[0].set_active(active)
    with pytest.raises(KernelError):
        mlp()[0](x_of(1, HIDDEN), active)


def test_mlp_arguments_that_do_not_fit_are_refused():
    module, (gate, up, down) = mlp()
    for arguments, message in (
        ((gate, up[1:], down), "up is bfloat16 \\[89, 24\\], it must be as gate"),
        ((gate, up, down.half()), "down_t is float16"),
        ((gate, up, down, "swish"), "allowed: silu"),
    ):
        with pytest.raises(KernelError, match=message):
            NeuronSubsetMLP.from_dense(*arguments)
    for x in (x_of(2, HIDDEN - 1), x_of(2, HIDDEN, dtype=torch.float16)):
        with pytest.raises(KernelError, match="x "):
            module(x)


@pytest.mark.parametrize("assign", [True, False])
def test_mlp_states_are_the_three_layers(assign):
    module, weights = mlp()
    names = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    state = module.state_dict()
    assert list(state) == names
    assert all(torch.equal(state[name], weight) for name, weight in zip(names, weights, strict=True))
    module.set_active(CHOSEN)
    other = copy.deepcopy(module)
    other.load_state_dict({name: -weight for name, weight in zip(names, weights, strict=True)}, assign=assign)
    x = x_of(1, HIDDEN)
    assert torch.equal(other(x), neuron_mlp(x, -module.gate, -module.up, -module.down_t, CHOSEN.int()))
    with pytest.raises(RuntimeError, match="down_proj.weight: shape"):
        module.load_state_dict({**state, "down_proj.weight": module.down_t})
    with pytest.raises(RuntimeError, match="Missing key.*up_proj"):
        module.load_state_dict({name: state[name] for name in (names[0], names[2])})


def test_mlp_casts_and_compiles():
    module, _ = mlp()
    module.set_active(CHOSEN)
    with torch.no_grad():
        for rows in (2, 20):
            x = x_of(rows, HIDDEN)
            assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    x = x_of(2, HIDDEN, dtype=torch.float16)
    module.half()
    assert module.active.dtype is torch.int32
    assert torch.equal(module(x), neuron_mlp(x, module.gate, module.up, module.down_t, CHOSEN.int()))
