"""The Triton kernels in Triton's interpreter, on CPU tensors: `test_triton.py` runs this file in a process of its own.

TRITON_INTERPRET=1 must be set before Triton is imported, and then holds for the whole process. The interpreter runs
programs one after the other in NumPy, so the shapes are small; small `PROGRAMS` or steps make several splits of them.
"""

# ruff: noqa: E402 - without Triton, none of its kernels can be imported

from __future__ import annotations

import gc

import pytest
import torch
from gemv_cases import FLOATS, HALVES, assert_close, bits_of, exact, integers, normal
from gemv_cases import poisoned_results as poisoned
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from gossamer.errors import KernelError
from gossamer.kernels import backend
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv import gpu_layout, layout
from gossamer.kernels.bitmask_gemv.dispatch import bitmask_gemv, describe, pack, unpack
from gossamer.kernels.channel_gemv import triton as channel_gpu
from gossamer.kernels.channel_gemv.dispatch import channel_gemv
from gossamer.kernels.derived import Derived
from gossamer.kernels.dual_gemv import gpu_layout as dual_layout
from gossamer.kernels.dual_gemv import triton as dual_gpu
from gossamer.kernels.neuron_mlp import triton as neuron_gpu
from gossamer.kernels.nm_gemv import dispatch as nm

INF, NAN = float("inf"), float("nan")
SPARSITIES = [0.0, 0.3, 0.5, 0.9, 1.0]


@pytest.fixture(autouse=True)
def _on_triton():
    assert backend.interpreted()
    with backend.forced("triton"):
        yield


def mask_of(rows: int, cols: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) >= sparsity


def packed_of(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    bits = bitmask.pack_bits(mask)
    return pack(bits, bitmask.compress(weight, bits), weight.shape[1])


def kept(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(x.float().abs() > threshold, x, torch.zeros_like(x))


# ---- bitmask ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "cols", "batch", "sparsity"),
    [
        (1, 1, 1, 0.0),
        (1, 63, 2, 0.3),
        (9, 100, 3, 0.5),
        (5, 4097, 1, 0.9),
        (4, 128, 8, 1.0),
        (8, 300, 5, 0.5),
        (3, 8200, 2, 0.5),
        (0, 5, 1, 0.5),
        (5, 0, 1, 0.5),
    ],
)
def test_bitmask_is_exact_on_whole_numbers(rows, cols, batch, sparsity, dtype, monkeypatch):
    weight, mask = integers(rows, cols, dtype=dtype, seed=1), mask_of(rows, cols, sparsity)
    x = integers(batch, cols, dtype=dtype, seed=batch, zeros=0.1)
    with poisoned(monkeypatch):
        assert torch.equal(bitmask_gemv(x, packed_of(weight, mask), rows), exact(x, weight * mask))


@pytest.mark.parametrize("dtype", HALVES)
def test_bitmask_rounds_as_float32_and_gives_a_row_the_same_bits_in_any_company(dtype):
    weight, mask = normal(6, 1500, dtype=dtype, seed=3), mask_of(6, 1500, 0.5)
    x, packed = normal(8, 1500, dtype=dtype, seed=4), packed_of(weight, mask)
    together = bitmask_gemv(x, packed, 6)
    assert_close(together, x, weight * mask)
    for i in (0, 5):
        assert torch.equal(bits_of(bitmask_gemv(x[i], packed, 6)), bits_of(together[i]))
    assert torch.equal(bits_of(bitmask_gemv(x[2:5], packed, 6)), bits_of(together[2:5]))


def test_bitmask_infinity_nan_and_negative_zero_as_in_the_dense_matrix():
    weight = torch.zeros(5, 40, dtype=torch.bfloat16)
    mask = torch.zeros(5, 40, dtype=torch.bool)
    mask[0], mask[1, 3], mask[2, 4], mask[3, :9] = True, True, True, True
    weight[0], weight[1, 3], weight[2, 4], weight[3, 8] = 1.0, -INF, NAN, 2.0
    x = torch.ones(3, 40, dtype=torch.bfloat16)
    x[1, 7], x[2, 9] = INF, NAN
    y = bitmask_gemv(x, packed_of(weight, mask), 5)
    assert y[0].nan_to_num(7.0, posinf=8.0, neginf=9.0).tolist() == [40.0, 9.0, 7.0, 2.0, 0.0]
    assert y[1].isnan().tolist() == [False, True, True, True, True]
    assert y[1, 0] == INF
    assert y[2].isnan().all()
    zeros = torch.full((4, 128), -0.0, dtype=torch.bfloat16)
    y = bitmask_gemv(torch.ones(1, 128, dtype=torch.bfloat16), packed_of(zeros, mask_of(4, 128, 0.5)), 4)
    assert torch.equal(y, torch.zeros(1, 4, dtype=torch.bfloat16))


def test_index_says_where_every_tile_and_row_begins():
    rows, cols = 9, 8200
    mask = mask_of(rows, cols, 0.6)
    packed = packed_of(integers(rows, cols, dtype=torch.bfloat16, seed=1), mask)
    shape = layout.Shape(rows, cols)
    index = gpu_layout.make(packed, shape)
    assert index.shape == (3, 65)
    stream = packed[shape.stream :]
    for row_tile, tile in ((0, 0), (2, 64), (1, 31), (1, 32), (0, 33)):
        entry = int(index[row_tile, tile])
        part = mask[4 * row_tile : 4 * row_tile + 4, 128 * tile : 128 * tile + 128]
        found = bitmask.unpack_bits(stream[2 * (entry >> 27) :][:64].view(4, 16), 128)
        assert torch.equal(found[: len(part), : part.shape[1]], part)
        assert int(found.sum()) == int(part.sum())
        ends = found.sum(1).cumsum(0).tolist()
        assert [entry & 511, entry >> 9 & 511, entry >> 18 & 511] == ends[:3]


def test_index_is_made_once_and_goes_with_the_memory(monkeypatch):
    made, real = [], gpu_layout.make
    monkeypatch.setattr(gpu_layout, "make", lambda *arguments: made.append(1) or real(*arguments))
    monkeypatch.setattr(gpu_layout, "indices", Derived())
    x, weight = torch.ones(1, 40, dtype=torch.bfloat16), integers(4, 40, dtype=torch.bfloat16, seed=1)
    packed = packed_of(weight, mask_of(4, 40, 0.5))
    for tensor in (packed, packed, packed.detach(), packed.clone(), packed):
        bitmask_gemv(x, tensor, 4)
    assert len(made) == 2
    del packed, tensor
    gc.collect()  # the interpreter keeps its last arguments in a cycle
    bitmask_gemv(x, packed_of(weight, mask_of(4, 40, 0.2)), 4)
    assert len(gpu_layout.indices) == 1


def test_a_write_makes_a_new_index():
    weight = integers(4, 8, dtype=torch.bfloat16, seed=1)
    masks = torch.zeros(2, 4, 8, dtype=torch.bool)
    masks[0, :, :3], masks[1, :, 5:] = True, True
    masks[1, 0, 5:], masks[1, 0, 0:3] = False, True
    first, second = (packed_of(weight, mask) for mask in masks)
    x = integers(1, 8, dtype=torch.bfloat16, seed=2)
    assert torch.equal(bitmask_gemv(x, first, 4), exact(x, weight * masks[0]))
    first.copy_(second)
    assert torch.equal(bitmask_gemv(x, first, 4), exact(x, weight * masks[1]))


# ---- N:M ----


def nm_mask(rows: int, cols: int, keep: int, group: int) -> torch.Tensor:
    """At most `keep` of `group`: every third group has one fewer."""
    groups = -(-cols // group)
    rank = torch.rand(rows, groups, group, generator=torch.Generator().manual_seed(1)).argsort(-1).argsort(-1)
    limit = keep - (torch.arange(groups) % 3 == 2).int()
    return (rank < limit[:, None]).flatten(1)[:, :cols]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pattern", nm.PATTERNS)
def test_fixed_groups_are_exact(pattern, dtype, monkeypatch):
    for (rows, cols), batch in (((5, 136), 1), ((1, 63), 3), ((4, 1100), 8), ((0, 8), 1), ((3, 0), 1)):
        mask, weight = nm_mask(rows, cols, *pattern), integers(rows, cols, dtype=dtype, seed=1)
        bits = bitmask.pack_bits(mask)
        values = nm.pack(bits, bitmask.compress(weight, bits), cols, *pattern)
        x = integers(batch, cols, dtype=dtype, seed=2)
        with poisoned(monkeypatch):
            assert torch.equal(nm.nm_gemv(x, bits, values, *pattern), exact(x, weight * mask)), (rows, cols)


def test_fixed_groups_give_a_row_the_same_bits_in_any_company_and_meet_infinities():
    mask, weight = nm_mask(6, 1100, 2, 4), normal(6, 1100, dtype=torch.bfloat16, seed=1)
    bits = bitmask.pack_bits(mask)
    values = nm.pack(bits, bitmask.compress(weight, bits), 1100, 2, 4)
    x = normal(5, 1100, dtype=torch.bfloat16, seed=2)
    together = nm.nm_gemv(x, bits, values, 2, 4)
    assert_close(together, x, weight * mask)
    assert torch.equal(bits_of(nm.nm_gemv(x[4], bits, values, 2, 4)), bits_of(together[4]))
    x[1, 3] = INF
    y = nm.nm_gemv(x, bits, values, 2, 4)
    assert y[1].isnan().tolist() == (~mask[:, 3]).tolist()
    assert torch.equal(y[0], together[0])


@pytest.mark.parametrize("pattern", nm.PATTERNS)
def test_codes_with_too_many_bits_are_read_as_the_reference_says(pattern):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (5, 9), dtype=torch.uint8, generator=generator)
    values = integers(5, 9 * 8 * pattern[0] // pattern[1], dtype=torch.float16, seed=1)
    x = integers(2, 72, dtype=torch.float16, seed=2)
    found = nm.nm_gemv(x, codes, values, *pattern)
    with backend.forced("reference"):
        assert torch.equal(found, nm.nm_gemv(x, codes, values, *pattern))


# ---- active channels ----


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("channels", "outputs", "batch", "share"),
    [
        (1, 1, 1, 0.0),
        (63, 1, 2, 0.3),
        (100, 63, 3, 0.5),
        (1100, 5, 1, 0.9),
        (40, 300, 8, 0.5),
        (33, 20, 2, 1.0),
        (0, 5, 1, 0.5),
        (5, 0, 1, 0.5),
    ],
)
def test_active_channels_are_exact(channels, outputs, batch, share, dtype, monkeypatch):
    weight_t = integers(channels, outputs, dtype=dtype, seed=1)
    x = integers(batch, channels, dtype=dtype, seed=batch, zeros=0.2)
    threshold = torch.rand(channels, generator=torch.Generator().manual_seed(3)) * 16 * share - float(share == 0)
    with poisoned(monkeypatch):
        assert torch.equal(channel_gemv(x, weight_t, threshold), exact(kept(x, threshold), weight_t.t()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_active_channels_round_as_float32(dtype):
    weight_t, x = normal(300, 20, dtype=dtype, seed=3), normal(3, 300, dtype=dtype, seed=4)
    threshold = torch.full((300,), 0.7)
    assert_close(channel_gemv(x, weight_t, threshold), kept(x, threshold), weight_t.t())


def test_list_is_ascending_and_counted_on_the_device(monkeypatch):
    monkeypatch.setattr(channel_gpu, "LIST_BLOCK", 32)  # several programs, the last one not full
    x = integers(3, 100, dtype=torch.bfloat16, seed=1, zeros=0.7)
    ids, factors, count = channel_gpu.list_active(x, 3, torch.zeros(100))
    wanted = (x != 0).any(0).nonzero().squeeze(1)
    assert 0 < len(wanted) < 100
    assert int(count) == len(wanted)
    assert torch.equal(ids[: len(wanted)].long(), wanted)
    assert torch.equal(factors[:, : len(wanted)], x[:, wanted].float())


def test_the_threshold_itself_is_skipped_and_nan_never_is():
    weight_t = torch.eye(4)
    y = channel_gemv(torch.tensor([0.5, -0.5, 0.75, -0.75]), weight_t, torch.full((4,), 0.5))
    assert y.tolist() == [0.0, 0.0, 0.75, -0.75]
    y = channel_gemv(torch.tensor([NAN, 1.0, 1.0, 1.0]), weight_t, torch.full((4,), INF))
    assert y.isnan().tolist() == [True] * 4
    assert (
        channel_gemv(torch.tensor([INF, 0.0, 0.0, 0.0]), torch.ones(4, 4), torch.full((4,), 2.0)).tolist() == [INF] * 4
    )
    assert channel_gemv(torch.ones(4), weight_t, torch.full((4,), NAN)).tolist() == [1.0] * 4


def test_skipped_channels_are_not_read():
    weight_t = integers(50, 33, dtype=torch.bfloat16, seed=1)
    x = integers(3, 50, dtype=torch.bfloat16, seed=2, zeros=0.6)
    unused = (x == 0).all(0)
    assert 0 < int(unused.sum()) < 50
    wanted = exact(x, weight_t.t())
    weight_t[unused] = NAN
    assert torch.equal(channel_gemv(x, weight_t, torch.zeros(50)), wanted)


# ---- active channels of a sparse matrix ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "cols", "batch", "sparsity", "share"),
    [
        (1, 1, 1, 0.0, 0.0),
        (63, 9, 2, 0.3, 0.5),
        (100, 33, 3, 0.5, 0.5),
        (300, 40, 8, 0.9, 0.3),
        (20, 200, 1, 0.5, 0.9),
        (65, 20, 2, 1.0, 0.5),
        (0, 5, 1, 0.5, 0.5),
        (5, 0, 1, 0.5, 0.5),
    ],
)
def test_dual_is_exact(rows, cols, batch, sparsity, share, dtype, monkeypatch):
    weight, mask = integers(rows, cols, dtype=dtype, seed=1), mask_of(rows, cols, sparsity)
    bits = bitmask.pack_bits(mask)
    matrix = dual_layout.make(bits, bitmask.compress(weight, bits), cols)
    x = integers(batch, cols, dtype=dtype, seed=2, zeros=0.2)
    threshold = torch.full((cols,), 8.0 * share)
    with poisoned(monkeypatch):
        y = dual_gpu.dual_gemv(x, batch, matrix, threshold, rows)
    assert torch.equal(y, exact(kept(x, threshold), weight * mask))


def test_dual_does_not_read_skipped_channels():
    weight, mask = integers(70, 30, dtype=torch.float16, seed=1), mask_of(70, 30, 0.5)
    x = integers(2, 30, dtype=torch.float16, seed=2, zeros=0.5)
    unused = (x == 0).all(0)
    assert 0 < int(unused.sum()) < 30
    wanted = exact(x, weight * mask)
    weight[:, unused] = NAN
    bits = bitmask.pack_bits(mask)
    matrix = dual_layout.make(bits, bitmask.compress(weight, bits), 30)
    assert torch.equal(dual_gpu.dual_gemv(x, 2, matrix, torch.zeros(30), 70), wanted)


def test_dual_matrix_is_made_once_per_packed_tensor():
    """Any packed tensor with a record will do: its own layout is not known here."""
    weight, mask = integers(9, 8, dtype=torch.float16, seed=1), mask_of(9, 8, 0.5)
    packed, unpacked = packed_of(weight, mask), []
    for _ in range(2):
        matrix = dual_layout.matrix_of(packed, describe(packed), lambda given: unpacked.append(1) or unpack(given))
    assert len(unpacked) == 1
    x = integers(1, 8, dtype=torch.float16, seed=2)
    assert torch.equal(dual_gpu.dual_gemv(x, 1, matrix, torch.zeros(8), 9), exact(x, weight * mask))


# ---- neurons ----

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
}


def mlp(x, gate, up, down_t, active, activation):
    """In float64, with what a sum in float32 and the activation after it may lose."""
    gate, up, down_t = (weight[active.long()].double() for weight in (gate, up, down_t))
    h = ACTIVATIONS[activation](x.double() @ gate.t()) * (x.double() @ up.t())
    size = (x.double().abs() @ gate.abs().t() + 1) * (x.double().abs() @ up.abs().t() + 1)
    return h @ down_t, size @ down_t.abs()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("activation", "batch"), [("silu", 1), ("gelu", 2), ("gelu_tanh", 3), ("relu", 8)])
def test_neurons_against_float64(activation, batch, dtype, monkeypatch):
    assert tuple(ACTIVATIONS) == neuron_gpu.ACTIVATIONS
    gate, up, down_t = (normal(30, 70, dtype=dtype, seed=seed) / 4 for seed in range(3))
    x, active = normal(batch, 70, dtype=dtype, seed=5), torch.randperm(30)[:11].int()
    with poisoned(monkeypatch):
        y = neuron_gpu.neuron_mlp(x, batch, gate, up, down_t, active, activation)
    truth, size = mlp(x, gate, up, down_t, active, activation)
    allowed = 100 * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * truth.abs() * 1.001
    assert ((y.double() - truth).abs() <= allowed).all()


def test_neurons_that_do_not_exist_add_nothing_and_none_give_zero(monkeypatch):
    gate, up, down_t = (normal(30, 40, dtype=torch.float32, seed=seed) for seed in range(3))
    x = normal(2, 40, dtype=torch.float32, seed=5)
    some = torch.tensor([3, 7, 29], dtype=torch.int32)
    more = torch.tensor([3, -1, 7, 30, 29, 1 << 30], dtype=torch.int32)
    wanted, found = (neuron_gpu.neuron_mlp(x, 2, gate, up, down_t, active) for active in (some, more))
    torch.testing.assert_close(found, wanted)
    with poisoned(monkeypatch):
        assert not neuron_gpu.neuron_mlp(x, 2, gate, up, down_t, some[:0]).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_neurons_meet_infinities_and_nan_as_torch_does(activation):
    """gate, up and down are 1: y is activation(x) x. In float64: torch's own float32 gelu makes NaN of infinity."""
    z = torch.tensor([[INF, -INF, NAN, -0.0, 90.0, -90.0, 1e30, -1e30]]).t().contiguous()
    one, active = torch.ones(1, 1), torch.zeros(1).int()
    y = neuron_gpu.neuron_mlp(z, 8, one, one, one, active, activation)
    wide = z.double()
    torch.testing.assert_close(y, (ACTIVATIONS[activation](wide) * wide).float(), equal_nan=True)


def test_neurons_give_a_row_the_same_bits_in_any_company():
    gate, up, down_t = (normal(30, 300, dtype=torch.bfloat16, seed=seed) / 8 for seed in range(3))
    x, active = normal(8, 300, dtype=torch.bfloat16, seed=5), torch.arange(0, 30, 2, dtype=torch.int32)
    together = neuron_gpu.neuron_mlp(x, 8, gate, up, down_t, active)
    alone = torch.cat([neuron_gpu.neuron_mlp(row[None], 1, gate, up, down_t, active) for row in x])
    assert torch.equal(bits_of(alone), bits_of(together))


# ---- errors before any kernel ----


def test_arguments_are_checked_before_triton_too():
    packed = packed_of(integers(4, 8, dtype=torch.bfloat16, seed=1), mask_of(4, 8, 0.5))
    with pytest.raises(KernelError, match="last length must be 8"):
        bitmask_gemv(torch.ones(1, 9, dtype=torch.bfloat16), packed, 4)
    damaged = packed.clone()
    damaged[72] = 1
    with pytest.raises(KernelError, match="malformed packed matrix"):
        bitmask_gemv(torch.ones(1, 8, dtype=torch.bfloat16), damaged, 4)
    assert describe(packed).rows == 4
