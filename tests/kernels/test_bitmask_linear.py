"""The packed linear layer against torch's dense one: products, gradients, casts, moves, state dicts, its weight."""

from __future__ import annotations

import copy

import pytest
import torch
from gemv_cases import HALVES, assert_close, exact, integers, normal
from torch import nn

from gossamer.errors import KernelError
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv.dispatch import unpack
from gossamer.kernels.modules import bitmask_linear
from gossamer.kernels.modules.bitmask_linear import BitmaskLinear
from gossamer.kernels.together.dispatch import together

OUT, IN = 37, 140
SHAPES = [(IN,), (1, IN), (8, IN), (2, 4, IN), (9, IN), (3, 11, IN), (0, IN), (2, 0, IN)]


def mask_of(rows: int = OUT, cols: int = IN) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)) >= 0.5


def layers(dtype: torch.dtype = torch.bfloat16, *, bias: bool = True) -> tuple[BitmaskLinear, nn.Linear]:
    """The same matrix of small whole numbers twice. The packed layer is made from a W that is not yet pruned."""
    full, mask = integers(OUT, IN, dtype=dtype, seed=1), mask_of()
    plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(full * mask)
    if bias:
        plain.bias.copy_(integers(1, OUT, dtype=dtype, seed=2)[0])
    return BitmaskLinear.from_dense(full, mask, plain.bias.clone() if bias else None), plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_equals_the_dense_layer(dtype, bias):
    sparse, plain = layers(dtype, bias=bias)
    for shape in SHAPES:
        x = integers(*shape, dtype=dtype, seed=3) if 0 not in shape else torch.empty(shape, dtype=dtype)
        y = sparse(x)
        wanted = exact(x, plain.weight) if x.numel() else x.new_empty(*shape[:-1], OUT)
        assert torch.equal(y, wanted if plain.bias is None else wanted + plain.bias), shape


def test_within_rounding_for_few_and_many_rows():
    full, mask = normal(OUT, IN, dtype=torch.bfloat16, seed=4), mask_of()
    sparse = BitmaskLinear.from_dense(full, mask)
    for rows in (1, 8, 9, 50):
        x = normal(rows, IN, dtype=torch.bfloat16, seed=rows)
        assert_close(sparse(x), x, full * mask)


def test_rows_apart_in_memory():
    sparse, plain = layers(bias=False)
    x = integers(4, 2 * IN, dtype=torch.bfloat16, seed=5)[:, ::2]
    assert not x.is_contiguous()
    assert torch.equal(sparse(x), plain(x))


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


def test_autocast_casts_the_input():
    sparse, plain = layers(bias=False)
    x = integers(3, IN, dtype=torch.float32, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparse(x), plain(x))


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize(("shape", "dtype"), [((IN,), torch.float32), ((IN - 1,), torch.bfloat16)])
def test_what_does_not_fit_is_refused(rows, shape, dtype):
    with pytest.raises(KernelError, match="x "):
        layers()[0](torch.zeros(rows, *shape, dtype=dtype))
    with pytest.raises(KernelError, match="bias"):
        BitmaskLinear(layers()[0].packed, torch.zeros(OUT + 1))


def test_deepcopy_and_new_memory():
    sparse, plain = layers(bias=False)
    x = integers(2, IN, dtype=torch.bfloat16, seed=10)
    twin = copy.deepcopy(sparse)
    sparse.packed.zero_()
    assert torch.equal(twin(x), plain(x))
    with pytest.raises(KernelError, match="malformed"):
        sparse(x)


def test_cast_keeps_the_mask_and_float32_is_refused():
    full, mask = integers(OUT, IN, dtype=torch.bfloat16, seed=11, zeros=0.3), mask_of()
    sparse = nn.Sequential(BitmaskLinear.from_dense(full, mask)).half()[0]
    bits, values, _ = unpack(sparse.packed)
    assert torch.equal(bits, bitmask.pack_bits(mask))
    assert torch.equal(values, full[mask].half())
    x = integers(2, IN, dtype=torch.float16, seed=12)
    assert torch.equal(sparse(x), exact(x, (full * mask).half()))
    with pytest.raises(KernelError, match="float32"):
        sparse.float()
    assert sparse.dtype is torch.float16
    assert sparse.packed.dtype is torch.uint8


def test_state_dict_is_the_dense_layers():
    sparse, plain = layers()
    state = sparse.state_dict()
    assert list(state) == ["weight", "bias"]
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("assign", [True, False])
def test_other_weights_under_the_same_mask(assign):
    sparse, plain = layers()
    other = {"weight": plain.weight * 2, "bias": plain.bias + 1}
    holder = nn.ModuleDict({"layer": sparse})
    x = integers(2, IN, dtype=torch.bfloat16, seed=13)
    sparse(x)
    kept = unpack(sparse.packed)[0]
    holder.load_state_dict({f"layer.{name}": tensor for name, tensor in other.items()}, assign=assign)
    assert torch.equal(unpack(sparse.packed)[0], kept)
    assert torch.equal(sparse(x), exact(x, other["weight"]) + other["bias"])


def test_a_state_that_does_not_fit_is_refused():
    sparse, plain = layers(bias=False)
    before = sparse.packed.clone()
    for state, message in (
        ({"weight": torch.ones(OUT, IN, dtype=torch.bfloat16)}, "not zero where"),
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

    def expanded(packed: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the matrix was expanded")

    monkeypatch.setattr(bitmask_linear.layout, "bitmask_dense", expanded)
    asked = sparse.weight
    for part in (asked, asked.detach(), asked.data):
        assert part.shape == plain.weight.shape
        assert (part.dtype, part.device, part.requires_grad) == (torch.bfloat16, torch.device("cpu"), False)
        assert part.numel() == OUT * IN
    assert repr(asked) == f"PackedWeight(shape=[{OUT}, {IN}], dtype=bfloat16, device=cpu)"
    sparse(integers(1, IN, dtype=torch.bfloat16, seed=14))


def test_the_weight_can_be_read():
    sparse, plain = layers(bias=False)
    x = integers(3, IN, dtype=torch.bfloat16, seed=15)
    assert torch.equal(nn.functional.linear(x, sparse.weight), plain(x))
    assert torch.equal(sparse.weight + 0, plain.weight)
    assert torch.equal(sparse.weight[3:5].float(), plain.weight[3:5].float())
    assert torch.equal(sparse.weight.t() @ torch.ones(OUT, 1, dtype=torch.bfloat16), plain.weight.sum(0)[:, None])
    assert torch.equal(torch.stack(sparse.weight.unbind()), plain.weight)
    assert type(sparse.weight + 0) is torch.Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.add_(1),
        lambda tensor: tensor.copy_(torch.zeros(OUT, IN)),
        lambda tensor: tensor.data.mul_(2),
        lambda tensor: tensor.__setitem__((0, 0), 1.0),
        lambda tensor: tensor[3].add_(1),
        lambda tensor: tensor.t().detach()[5:].zero_(),
        lambda tensor: tensor.unbind()[2].fill_(1),
        lambda tensor: torch.add(torch.zeros(OUT, IN), 1, out=tensor),
        lambda tensor: torch._foreach_add_([tensor], 1),
    ],
)
def test_the_weight_cannot_be_written(write):
    sparse, plain = layers()
    with pytest.raises(KernelError, match="in place"):
        write(sparse.weight)
    assert torch.equal(sparse.weight + 0, plain.weight)


@pytest.mark.parametrize("rows", [2, 20])
def test_compiled_whole_and_equal(rows):
    sparse, _ = layers()
    x = integers(rows, IN, dtype=torch.bfloat16, seed=16)
    with torch.no_grad():
        compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), sparse(x))


def test_a_weight_without_memory_reaches_no_kernel():
    weight = layers()[0].weight
    with pytest.raises(KernelError, match="no memory of its own"):
        bitmask.compress(weight, bitmask.pack_bits(mask_of()))
    with pytest.raises(KernelError, match="no memory of its own"):
        together(weight[:2], [integers(3, IN, dtype=torch.bfloat16, seed=0)])
