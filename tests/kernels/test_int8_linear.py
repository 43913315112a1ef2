"""The int8 linear layer against its own definition and torch's dense one: products, gradients, dtypes, state dicts."""

from __future__ import annotations

import copy

import pytest
import torch
from gemv_cases import FLOATS, integers, normal
from torch import nn
from torch.nn import functional

from gossamer.errors import KernelError
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv import dispatch as halves
from gossamer.kernels.int8_gemv.dispatch import dense, int8_gemv, pack
from gossamer.kernels.modules import int8_linear
from gossamer.kernels.modules.int8_linear import Int8BitmaskLinear
from gossamer.kernels.modules.sparse_linear import dense_products

OUT, IN = 37, 140


def packed_matrix(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    bits = bitmask.pack_bits(torch.rand(OUT, IN, generator=generator) >= 0.5)
    values = torch.randint(-128, 128, (int(bitmask.row_counts(bits).sum()),), generator=generator).to(torch.int8)
    return pack(bits, values, (torch.rand(OUT, 2, generator=generator) / 64).half(), IN)


def layers(dtype: torch.dtype = torch.bfloat16, *, bias: bool = True) -> tuple[Int8BitmaskLinear, nn.Linear]:
    """The same matrix twice, as the int8 layer and as the dense view of it."""
    packed = packed_matrix()
    plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(dense(packed, dtype))
    if bias:
        plain.bias.copy_(integers(1, OUT, dtype=dtype, seed=2)[0])
    return Int8BitmaskLinear(packed, plain.bias.clone() if bias else None, dtype=dtype), plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_few_rows_are_the_int8_product_and_more_the_dense_one(dtype, bias):
    sparse, plain = layers(dtype, bias=bias)
    for shape in [(IN,), (1, IN), (8, IN), (2, 4, IN)]:
        x = normal(*shape, dtype=dtype, seed=3)
        y = int8_gemv(x, sparse.packed, OUT)
        assert torch.equal(sparse(x), y if plain.bias is None else y + plain.bias), shape
        assert not torch.equal(sparse(x), plain(x))  # x was quantised
    for shape in [(9, IN), (3, 11, IN), (0, IN), (2, 0, IN)]:
        x = normal(*shape, dtype=dtype, seed=4)
        wanted = functional.linear(x, plain.weight)
        assert torch.equal(sparse(x), wanted if plain.bias is None else wanted + plain.bias), shape


@pytest.mark.parametrize("shape", [(IN,), (8, IN), (2, 4, IN)])
def test_torchs_products_in_its_place_quantise_x_as_well(shape):
    """A benchmark proves a model by them: over 22 layers exact x and quantised x part by 4 % of the logits."""
    sparse, plain = layers(torch.float32)
    x = normal(*shape, dtype=torch.float32, seed=5)
    with dense_products():
        wanted = sparse(x)
    assert (sparse(x) - wanted).norm() < 1e-6 * wanted.norm()
    assert (plain(x) - wanted).norm() > 1e-3 * wanted.norm()


def test_both_ways_agree_within_the_quantisation_of_x():
    sparse, plain = layers(torch.float32, bias=False)
    x = normal(8, IN, dtype=torch.float32, seed=5)
    step = x.abs().amax(1, keepdim=True) / 127
    allowed = 0.501 * step * plain.weight.abs().sum(1) + 1e-4
    assert ((sparse(x) - plain(x)).abs() <= allowed).all()


def test_rows_apart_in_memory():
    sparse, _ = layers(bias=False)
    x = normal(4, 2 * IN, dtype=torch.bfloat16, seed=5)[:, ::2]
    assert not x.is_contiguous()
    assert torch.equal(sparse(x), sparse(x.contiguous()))


@pytest.mark.parametrize("rows", [1, 8, 20])
def test_gradients_of_input_and_bias(rows):
    sparse, plain = layers()
    sparse.bias.requires_grad_(True)
    plain.bias.requires_grad_(True)
    results = []
    for layer in (sparse, plain):
        x = integers(rows, IN, dtype=torch.bfloat16, seed=6).requires_grad_(True)
        layer(x).backward(integers(rows, OUT, dtype=torch.bfloat16, seed=7))
        results.append((x.grad, layer.bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_training_holds_no_dense_matrix():
    sparse, _ = layers()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.shape) or tensor, lambda t: t):
        sparse(integers(20, IN, dtype=torch.bfloat16, seed=8).requires_grad_(True))
    assert torch.Size((OUT, IN)) not in held
    assert sparse.packed.shape in held


@pytest.mark.parametrize("rows", [3, 20])
def test_autocast_casts_the_input(rows):
    sparse, _ = layers(bias=False)
    x = integers(rows, IN, dtype=torch.float32, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(x), sparse(x.bfloat16()))


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize(("shape", "dtype"), [((IN,), torch.float32), ((IN - 1,), torch.bfloat16)])
def test_what_does_not_fit_is_refused(rows, shape, dtype):
    with pytest.raises(KernelError, match="x "):
        layers()[0](torch.zeros(rows, *shape, dtype=dtype))


def test_what_cannot_be_made_is_refused():
    with pytest.raises(KernelError, match="bias"):
        Int8BitmaskLinear(packed_matrix(), torch.zeros(OUT + 1))
    with pytest.raises(KernelError, match="compute in float64"):
        Int8BitmaskLinear(packed_matrix(), dtype=torch.float64)
    bits = torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(KernelError, match="int8 ones are needed"):
        Int8BitmaskLinear(halves.pack(bits, torch.zeros(0).half(), 8))


def test_deepcopy_and_new_memory():
    sparse, _ = layers(bias=False)
    x = normal(2, IN, dtype=torch.bfloat16, seed=10)
    wanted = sparse(x)
    twin = copy.deepcopy(sparse)
    sparse.packed.zero_()
    assert torch.equal(twin(x), wanted)
    with pytest.raises(KernelError, match="malformed"):
        sparse(x)


def test_casts_change_the_compute_dtype_only():
    sparse, _ = layers()
    before = sparse.packed.clone()
    holder = nn.Sequential(sparse)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        holder.to(dtype)
        assert (sparse.dtype, sparse.weight.dtype, sparse.bias.dtype) == (dtype, dtype, dtype)
        assert torch.equal(sparse.packed, before)
        assert torch.equal(sparse.weight + 0, dense(before, dtype))
        x = normal(2, IN, dtype=dtype, seed=12)
        assert torch.equal(sparse(x), int8_gemv(x, before, OUT) + sparse.bias)
    with pytest.raises(KernelError, match="compute in float64"):
        holder.double()
    assert sparse.dtype is torch.bfloat16


def test_state_dict_is_the_dense_layers():
    sparse, plain = layers()
    state = sparse.state_dict()
    assert list(state) == ["weight", "bias"]
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
def test_its_own_weights_are_taken_in_any_dtype(dtype, assign):
    sparse, _ = layers()
    state = {"layer.weight": dense(sparse.packed, dtype), "layer.bias": torch.ones(OUT, dtype=torch.bfloat16)}
    nn.ModuleDict({"layer": sparse}).load_state_dict(state, assign=assign)
    assert torch.equal(sparse.bias, torch.ones(OUT, dtype=torch.bfloat16))


def test_a_state_that_does_not_fit_is_refused():
    sparse, plain = layers(bias=False)
    before = sparse.packed.clone()
    for state, message in (
        ({"weight": plain.weight * 2}, "quantising them here would change them"),
        ({"weight": plain.weight.double()}, "quantising them here would change them"),
        ({"weight": plain.weight[:, 1:]}, "shape"),
        ({}, "Missing key"),
        ({"weight": plain.weight, "other": plain.weight}, "Unexpected key"),
    ):
        with pytest.raises(RuntimeError, match=message):
            copy.deepcopy(sparse).load_state_dict(state)
    assert torch.equal(sparse.packed, before)
    assert sparse.load_state_dict({}, strict=False).missing_keys == ["weight"]


def test_the_weight_answers_without_its_values(monkeypatch):
    sparse, plain = layers()

    def expanded(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("the matrix was expanded")

    with monkeypatch.context() as patch:
        patch.setattr(int8_linear, "dense", expanded)
        asked = sparse.weight
        for part in (asked, asked.detach(), asked.data):
            assert part.shape == plain.weight.shape
            assert (part.dtype, part.device, part.requires_grad) == (torch.bfloat16, torch.device("cpu"), False)
        sparse(integers(1, IN, dtype=torch.bfloat16, seed=14))
    assert torch.equal(sparse.weight[3:5].float(), plain.weight[3:5].float())
    with pytest.raises(KernelError, match="in place"):
        sparse.weight.add_(1)


@pytest.mark.parametrize("rows", [2, 20])
def test_compiled_whole_and_equal(rows):
    sparse, _ = layers()
    x = integers(rows, IN, dtype=torch.bfloat16, seed=16)
    with torch.no_grad():
        compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), sparse(x))
