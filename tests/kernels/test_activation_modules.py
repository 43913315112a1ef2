"""Layers that skip inputs, against torch's dense ones: products, gradients, states, other memory, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from gemv_cases import FLOATS, HALVES, exact, integers
from torch import Tensor, nn

from gossamer.errors import KernelError
from gossamer.kernels.active.prepared import Prepared
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.dual_gemv.dispatch import unpack
from gossamer.kernels.modules import thresholds
from gossamer.kernels.modules.channel_linear import ChannelSparseLinear
from gossamer.kernels.modules.counting import counting
from gossamer.kernels.modules.dual_linear import DualSparseLinear
from gossamer.kernels.modules.sparse_linear import SparseLinear, dense_products
from gossamer.kernels.modules.step import Step, stepping
from gossamer.kernels.modules.thresholds import ThresholdLinear

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


# ---- what sparse rows have beside thresholds ----


def parts(dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole numbers, so that every sum is exact."""
    return {
        "center": integers(1, IN, dtype=torch.float32, seed=11)[0],
        "shift": integers(1, OUT, dtype=torch.float32, seed=12)[0],
        "left": integers(OUT, 2, dtype=torch.float32, seed=13).sign(),
        "right": integers(2, IN, dtype=torch.float32, seed=14).sign(),
    }


def defined(x: Tensor, plain: nn.Linear, held: dict[str, Tensor]) -> Tensor:
    moved = (x.float() - held.get("center", torch.zeros(IN))).to(x.dtype).float()
    mask = moved.abs() > THRESHOLD
    y = (moved * mask) @ plain.weight.float().t() + held.get("shift", torch.zeros(OUT))
    if "left" in held:
        y = y + (moved * ~mask) @ held["right"].t() @ held["left"].t()
    return y + (0 if plain.bias is None else plain.bias.float())


@pytest.mark.parametrize("names", [("center",), ("shift",), ("left", "right"), ("center", "shift", "left", "right")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_center_shift_and_rest(kind, bias, names):
    sparse, plain = layers(kind, torch.float16, bias=bias)
    held = {name: parts(torch.float16)[name] for name in names}
    sparse.hold(**held)
    for rows in (1, 3, 8):
        x = x_of(rows, IN, dtype=torch.float16)
        wanted = defined(x, plain, held)
        assert wanted.abs().max() < 2048  # whole numbers that float16 holds
        assert torch.equal(sparse(x).float(), wanted)
        with dense_products():
            assert torch.equal(sparse(x).float(), wanted)
        with stepping(Step(dense=True)):
            assert torch.equal(sparse(x), exact(x, plain.weight) + (0 if plain.bias is None else plain.bias))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x).float(), wanted)
    assert list(sparse.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    if bias and "shift" in names:
        with torch.no_grad():
            sparse.bias.add_(1)
        assert torch.equal(sparse(x).float(), wanted + 1)


def test_parts_that_do_not_fit_are_refused():
    sparse, _ = layers("channel")
    for held, message in (
        ({"center": torch.zeros(IN + 1)}, "center has shape"),
        ({"shift": torch.zeros(IN)}, "shift has shape"),
        ({"left": torch.zeros(OUT, 2)}, "come together"),
        ({"left": torch.zeros(OUT, 2), "right": torch.zeros(3, IN)}, "right has shape"),
    ):
        with pytest.raises(KernelError, match=message):
            sparse.hold(**held)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_share_are_computed_together_and_counted(kind, monkeypatch):
    made = [layers(kind) for _ in range(3)]
    sparse = [one for one, _ in made]
    assert ThresholdLinear.share(sparse)
    calls, real, run = [], thresholds.active_gemv, Prepared.run
    monkeypatch.setattr(thresholds, "active_gemv", lambda *a: calls.append(len(a[2])) or real(*a))
    monkeypatch.setattr(Prepared, "run", lambda *a: calls.append(len(a[0]._matrices)) or run(*a))
    x = x_of(1, IN)
    wanted = [exact(skipped(x), plain.weight) + plain.bias for _, plain in made]
    with counting() as counted, torch.no_grad():
        for order in ((0, 1, 2), (2, 0, 1)):
            fresh = x.clone()
            assert all(torch.equal(sparse[i](fresh), wanted[i]) for i in order)
    assert calls == [3, 3]
    share = 1 - float((x.float().abs() > THRESHOLD).float().mean())
    assert all(counted.of(one).skipped == pytest.approx(share) for one in sparse)
    sparse[1].hold(center=torch.ones(IN))
    assert not ThresholdLinear.share(sparse)


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_calls_see_other_memory_and_other_numbers(kind):
    sparse, plain = layers(kind)
    x = x_of(1, IN)
    wanted = exact(skipped(x), plain.weight) + plain.bias
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: setattr(sparse, "packed", sparse.packed.clone()),
            lambda: setattr(sparse.packed, "data", sparse.packed.clone()),
            lambda: sparse.threshold.fill_(float("inf")),
            lambda: sparse.threshold.copy_(THRESHOLD),
            lambda: sparse.packed.copy_(sparse.packed.clone()),
        ):
            change()
            y = plain.bias.expand(1, OUT) if sparse.threshold[0] == float("inf") else wanted
            assert torch.equal(sparse(x.clone()), y)
            assert torch.equal(sparse(x.clone()), y)
        twin = copy.deepcopy(sparse)
        sparse.packed.zero_()  # of a packed matrix nothing is left
        assert torch.equal(twin(x), wanted)
        if kind == "channel":
            assert torch.equal(sparse(x), plain.bias.expand(1, OUT))
        else:
            with pytest.raises(KernelError, match="malformed"):
                sparse(x)
