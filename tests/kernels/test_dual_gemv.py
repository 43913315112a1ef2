"""Products with skipped inputs over packed weights: every tier against float64, the layout against a second writing."""

from __future__ import annotations

import copy

import pytest
import torch
from gemv_cases import BACKENDS, BATCHES, HALVES, assert_close, backend, bits_of, exact, integers, normal, threads
from gemv_cases import poisoned_results as poisoned

from gossamer.errors import KernelError
from gossamer.kernels import extension
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv.dispatch import pack as pack_tiles
from gossamer.kernels.channel_gemv.dispatch import channel_gemv
from gossamer.kernels.dual_gemv import dispatch, layout
from gossamer.kernels.dual_gemv.dispatch import dense, describe, dual_gemv, pack, unpack

# out x in
SHAPES = [(1, 1), (1, 63), (63, 1), (100, 63), (63, 100), (4097, 5), (5, 4097), (1100, 40), (0, 5), (5, 0), (256, 13)]
SPARSITIES = [0.0, 0.3, 0.5, 0.9, 1.0]
INF, NAN = float("inf"), float("nan")


def packed_of(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    bits = bitmask.pack_bits(mask)
    return pack(bits, bitmask.compress(weight, bits), weight.shape[1])


def mask_of(rows: int, cols: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) >= sparsity


def limits(cols: int, share: float) -> torch.Tensor:
    """Thresholds of whole numbers up to 7, from "nothing is skipped" to "everything"."""
    drawn = torch.rand(cols, generator=torch.Generator().manual_seed(3))
    return drawn * 16 * share - float(share == 0)


def kept(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(x.float().abs() > threshold, x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS)
def test_whole_numbers_are_exact(name, dtype, monkeypatch):
    """Every shape at several sparsities of weights and of inputs."""
    with backend(name), poisoned(monkeypatch):
        for index, (rows, cols) in enumerate(SHAPES):
            weight = integers(rows, cols, dtype=dtype, seed=1)
            turned = SPARSITIES[index % 5 :] + SPARSITIES[: index % 5]
            for batch, sparsity, share in zip(BATCHES, turned, SPARSITIES, strict=True):
                mask, threshold = mask_of(rows, cols, sparsity), limits(cols, share)
                x = integers(batch, cols, dtype=dtype, seed=batch, zeros=0.1)
                y = dual_gemv(x, packed_of(weight, mask), threshold, rows)
                assert torch.equal(y, exact(kept(x, threshold), weight * mask)), (rows, cols, batch, sparsity, share)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_batch_at_every_sparsity(name):
    weight, threshold = integers(330, 61, dtype=torch.bfloat16, seed=1), limits(61, 0.5)
    with backend(name):
        for sparsity in SPARSITIES:
            mask = mask_of(330, 61, sparsity)
            packed = packed_of(weight, mask)
            for batch in range(1, 9):
                x = integers(batch, 61, dtype=torch.bfloat16, seed=batch)
                wanted = exact(kept(x, threshold), weight * mask)
                assert torch.equal(dual_gemv(x, packed, threshold, 330), wanted), (sparsity, batch)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS)
def test_within_the_rounding_of_float32(name, dtype):
    weight, mask = normal(97, 1000, dtype=dtype, seed=3), mask_of(97, 1000, 0.5)
    x, threshold = normal(3, 1000, dtype=dtype, seed=4), torch.full((1000,), 0.7)
    with backend(name):
        assert_close(dual_gemv(x, packed_of(weight, mask), threshold, 97), kept(x, threshold), weight * mask)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_same_bits_for_any_threads_and_any_company(name, dtype):
    weight, x = normal(4331, 515, dtype=dtype, seed=5), normal(8, 515, dtype=dtype, seed=6)
    mask = mask_of(4331, 515, 0.5)
    mask[:1000] = mask_of(1000, 515, 0.95)
    packed, threshold = packed_of(weight, mask), torch.rand(515, generator=torch.Generator().manual_seed(7))
    with backend(name), threads(1):
        together = dual_gemv(x, packed, threshold, 4331)
        alone = torch.cat([dual_gemv(row[None], packed, threshold, 4331) for row in x])
    assert torch.equal(bits_of(alone), bits_of(together))
    for count in (2, 3, 4):
        with backend(name), threads(count):
            assert torch.equal(bits_of(dual_gemv(x, packed, threshold, 4331)), bits_of(together)), count


@pytest.mark.parametrize("name", BACKENDS[1:])
def test_the_bits_of_channel_gemv_with_the_dense_matrix(name):
    """The same additions in the same order, so skipping is decided alike as well."""
    weight, mask = normal(300, 700, dtype=torch.bfloat16, seed=8), mask_of(300, 700, 0.6)
    x, threshold = normal(2, 700, dtype=torch.bfloat16, seed=9), torch.full((700,), 0.6)
    weight_t = (weight * mask).t().contiguous()
    with backend(name):
        y = dual_gemv(x, packed_of(weight, mask), threshold, 300)
        assert torch.equal(bits_of(y), bits_of(channel_gemv(x, weight_t, threshold)))


@pytest.mark.parametrize("name", BACKENDS)
def test_the_threshold_itself_is_skipped_and_nan_never_is(name):
    packed = packed_of(torch.eye(4, dtype=torch.float16), torch.eye(4, dtype=torch.bool))
    x = lambda *values: torch.tensor(values, dtype=torch.float16)
    with backend(name):
        assert dual_gemv(x(0.5, -0.5, 0.75, -0.75), packed, torch.full((4,), 0.5), 4).tolist() == [0, 0, 0.75, -0.75]
        assert dual_gemv(x(0.0, -0.0, 1.0, -1.0), packed, torch.zeros(4), 4).tolist() == [0, 0, 1, -1]
        assert dual_gemv(x(NAN, 1.0, 1.0, 1.0), packed, torch.full((4,), INF), 4).isnan().all()  # NaN times +0.0
        assert dual_gemv(torch.ones(4).half(), packed, torch.full((4,), NAN), 4).tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS)
def test_infinity_meets_pruned_entries_unless_it_is_skipped(name, dtype):
    weight, mask = torch.ones(3, 2, dtype=dtype), torch.tensor([[True, True], [False, True], [True, True]])
    weight[2, 1] = -INF
    packed = packed_of(weight, mask)
    with backend(name):
        y = dual_gemv(torch.tensor([[INF, 0.0], [1.0, 1.0]], dtype=dtype), packed, torch.tensor([-1.0, 0.5]), 3)
        assert y[0, 0] == INF
        assert y[0, 1].isnan()  # pruned
        assert y[1].tolist() == [2.0, 1.0, -INF]
        skipped = dual_gemv(torch.tensor([INF, 1.0], dtype=dtype), packed, torch.tensor([INF, 0.5]), 3)
        assert skipped.tolist() == [1.0, 1.0, -INF]


@pytest.mark.parametrize("name", BACKENDS)
def test_skipped_channels_are_not_read(name):
    weight = integers(70, 50, dtype=torch.bfloat16, seed=1)
    x = integers(3, 50, dtype=torch.bfloat16, seed=2, zeros=0.6)
    unused = (x == 0).all(0)
    assert 0 < int(unused.sum()) < 50
    wanted = exact(x, weight)
    weight[:, unused] = NAN
    with backend(name):
        assert torch.equal(dual_gemv(x, packed_of(weight, mask_of(70, 50, 0.0)), torch.zeros(50), 70), wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_negative_zero_is_kept_and_sums_as_zero(dtype):
    weight = torch.full((128, 4), -0.0, dtype=dtype)
    packed = packed_of(weight, mask_of(128, 4, 0.5))
    assert torch.signbit(dense(packed)).sum() == mask_of(128, 4, 0.5).sum()
    for name in BACKENDS[1:]:
        with backend(name):
            y = dual_gemv(torch.ones(1, 4, dtype=dtype), packed, torch.zeros(4), 128)
            assert torch.equal(y, torch.zeros(1, 128, dtype=dtype))


# ---- the layout ----


@pytest.mark.parametrize(("sparsity", "dtype"), list(zip(SPARSITIES, HALVES * 3, strict=False)))
def test_packing_is_lossless_and_both_writings_agree(sparsity, dtype):
    """Any bits as values, NaN payloads included: C++ and torch pack the same bytes and unpack what was packed."""
    for rows, cols in SHAPES:
        mask = mask_of(rows, cols, sparsity, seed=rows)
        raw = torch.randint(-(2**15), 2**15, (rows, cols), generator=torch.Generator().manual_seed(cols))
        bits, values = bitmask.pack_bits(mask), raw.to(torch.int16).view(dtype)[mask]
        packed = pack(bits, values, cols)
        assert torch.equal(packed, layout.pack(bits, values, cols))
        layout.check(packed)
        for found_bits, found_values, found_cols in (unpack(packed), layout.unpack(packed)):
            assert torch.equal(found_bits, bits)
            assert torch.equal(found_values.view(torch.int16), values.view(torch.int16))
            assert (found_values.dtype, found_cols) == (dtype, cols)
        record = describe(packed)
        assert (record.rows, record.cols, record.nnz, record.dtype) == (rows, cols, int(mask.sum()), dtype)


def test_layout_written_by_hand():
    """Channel 0 keeps outputs 0 and 69, channel 1 nothing, channel 2 output 1."""
    mask = torch.zeros(70, 3, dtype=torch.bool)
    mask[0, 0] = mask[69, 0] = mask[1, 2] = True
    weight = torch.arange(210.0).view(70, 3).half()
    packed = packed_of(weight, mask)
    assert packed[:64].view(torch.int64).tolist() == [layout.MAGIC, 70, 3, 2, 3, 256, 128, len(packed)]
    assert packed[64:88].view(torch.int32).tolist() == [0, 10, 18, 10, 18, 27]
    words = packed[128 : len(packed) - 64].view(torch.int16)
    halves = words.view(torch.float16)
    assert words.count_nonzero() == 5  # three masks, two values; the third value is 0.0
    assert (words[0], halves[4], words[5], halves[9]) == (1, 0.0, 32, 207.0)
    assert (words[18], halves[22]) == (2, 5.0)
    assert packed[-64:].tolist() == [0] * 64


def test_size_is_what_the_readme_says():
    weight, mask = normal(4096, 64, dtype=torch.bfloat16, seed=1), mask_of(4096, 64, 0.5)
    packed = packed_of(weight, mask)
    n, nnz = weight.numel(), int(mask.sum())
    assert len(packed) == 64 + 4 * 17 * 64 + n // 8 + 2 * nnz + 64
    assert len(packed) < 0.58 * 2 * n


def test_dense_is_the_matrix_bit_for_bit():
    weight, mask = normal(300, 31, dtype=torch.bfloat16, seed=1), mask_of(300, 31, 0.4)
    assert torch.equal(bits_of(dense(packed_of(weight, mask))), bits_of(weight.masked_fill(~mask, 0.0)))


def test_plain_torch_gives_the_same_tensor(monkeypatch):
    with_module = good()
    monkeypatch.setattr(dispatch, "compiled", lambda: None)
    assert torch.equal(good(), with_module)
    assert torch.equal(dense(with_module), integers(300, 9, dtype=torch.bfloat16, seed=1) * mask_of(300, 9, 0.5))


# ---- what cannot be right ----


def good() -> torch.Tensor:
    return packed_of(integers(300, 9, dtype=torch.bfloat16, seed=1), mask_of(300, 9, 0.5))


STREAM = 192  # of good(): 64 bytes of header, 3 x 9 offsets


def altered(byte: int, value: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    packed = good()
    packed[byte : byte + dtype.itemsize].view(dtype)[0] = value
    return packed


def with_stray_bit() -> torch.Tensor:
    """A bit beyond the outputs of the first channel, in place of one inside."""
    packed, at = good(), STREAM
    for _ in range(4):
        at += 8 + 2 * int(bitmask.row_counts(packed[None, at : at + 8]))
    byte = next(i for i, value in enumerate(packed[at : at + 5].tolist()) if value)
    packed[at + byte] = int(packed[at + byte]) & (int(packed[at + byte]) - 1)
    packed[at + 7] = 0x80  # 300 outputs leave 44 in the last block
    return packed


@pytest.mark.parametrize("written", ["compiled", "torch"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: good()[:40], "shorter than its header"),
        (lambda: altered(0, 1), "not a matrix packed for dual sparsity"),
        (lambda: altered(8, -1), "out of range"),
        (lambda: altered(16, 1 << 31), "out of range"),
        (lambda: altered(8, (1 << 31) - 1), "layout is another one"),
        (lambda: altered(24, 0), "neither bfloat16 nor float16"),
        (lambda: altered(32, -1), "number of values"),
        (lambda: altered(32, 9 * 300 + 1), "number of values"),
        (lambda: altered(32, 100), "length"),
        (lambda: altered(40, 512), "layout is another one"),
        (lambda: altered(48, 64), "layout is another one"),
        (lambda: altered(56, 1 << 60), "length"),
        (lambda: good()[:-8].clone(), "length"),
        (lambda: torch.cat([good(), torch.zeros(8, dtype=torch.uint8)]), "length"),
        (lambda: altered(64, 1, torch.int32), "offsets are out of order"),
        (lambda: altered(68, -5, torch.int32), "offsets are out of order|reaches beyond"),
        (lambda: altered(64 + 36, 1 << 30, torch.int32), "offsets are out of order"),
        (lambda: altered(64 + 104, 3, torch.int32), "offsets are out of order"),
        (with_stray_bit, "outside the matrix"),
    ],
)
def test_malformed_packed_tensors_are_refused(written, make, message, monkeypatch):
    if written == "torch":
        monkeypatch.setattr("gossamer.kernels.dual_gemv.record.compiled", lambda: None)
    elif extension.compiled() is None:
        pytest.skip("no compiled module")
    with pytest.raises(KernelError, match=message):
        dual_gemv(torch.ones(1, 9, dtype=torch.bfloat16), make(), torch.zeros(9), 300)


def test_both_checks_agree_on_damaged_tensors():
    module = extension.compiled()
    if module is None:
        pytest.skip("no compiled module")
    generator = torch.Generator().manual_seed(1)
    healthy = 0
    for _ in range(300):
        packed = good()
        position = torch.randint(0, len(packed), (1,), generator=generator)
        packed[position] = torch.randint(0, 256, (1,), dtype=torch.uint8, generator=generator)
        try:
            layout.check(packed)
            fault = None
        except layout.Fault as error:
            fault = str(error)
        found = module.dual_fault(packed.data_ptr(), len(packed))
        assert (found is None) == (fault is None), (int(position), found, fault)
        healthy += fault is None
    assert 100 < healthy < 300  # most damage hits values, which may be anything


X, T = torch.ones(1, 9, dtype=torch.bfloat16), torch.zeros(9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: dual_gemv(X.half(), p, T, 300), "x is float16, the weight bfloat16"),
        (lambda p: dual_gemv(X[:, :8], p, T, 300), "last length must be 9"),
        (lambda p: dual_gemv(X, p, T, 299), "has 300 rows, the call says 299"),
        (lambda p: dual_gemv(X.expand(9, 9), p, T, 300), "9 rows, 1 to 8"),
        (lambda p: dual_gemv(X.expand(2, 9), p, T, 300), "strides"),
        (lambda p: dual_gemv(X.clone().requires_grad_(), p, T, 300), "requires a gradient"),
        (lambda p: dual_gemv(X, p, T.double(), 300), "threshold is float64"),
        (lambda p: dual_gemv(X, p, T[:8], 300), r"threshold has shape \[8\]"),
        (lambda p: dual_gemv(X, p.view(1, -1), T, 300), r"uint8 \[size\]"),
        (lambda p: dual_gemv(X, torch.cat([p[:1], p])[1:], T, 300), "multiple of 8"),
        (
            lambda p: dual_gemv(X, pack_tiles(torch.zeros(300, 2).byte(), X[0, :0], 9), T, 300),
            "not a matrix packed for",
        ),
        (lambda p: pack(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(0), 8), "float32, allowed: bfloat16 and"),
        (lambda p: pack(torch.ones(1, 1, dtype=torch.uint8), torch.zeros(0).half(), 8), "0 values for 1 set bits"),
        (lambda p: pack(torch.zeros(1, 1, dtype=torch.uint8, device="meta"), torch.zeros(0).half(), 8), "on the CPU"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call(good())


def test_more_than_offsets_reach_is_refused(monkeypatch):
    monkeypatch.setattr(layout, "MAX_LENGTH", 1000)
    with pytest.raises(KernelError, match="more than 4 GiB"):
        good()


# ---- the record: other memory is checked anew, the same memory is not ----


def test_memory_is_checked_once_and_other_memory_anew(monkeypatch):
    from gossamer.kernels.dual_gemv import record

    real, seen = record._fault, []
    monkeypatch.setattr(record, "_fault", lambda packed: seen.append(len(packed)) or real(packed))
    module = torch.nn.Module()
    module.register_buffer("packed", good())
    wanted = dual_gemv(X, module.packed, T, 300)
    assert torch.equal(dual_gemv(X, module.packed.detach(), T, 300), wanted)
    assert len(seen) == 1
    twin = copy.deepcopy(module)
    assert torch.equal(dual_gemv(X, twin.packed, T, 300), wanted)
    module.load_state_dict({"packed": good()})  # copies into the old memory
    assert torch.equal(dual_gemv(X, module.packed, T, 300), wanted)
    module.load_state_dict({"packed": good()}, assign=True)
    assert torch.equal(dual_gemv(X, module.packed, T, 300), wanted)
    assert len(seen) == 4


def test_a_write_that_breaks_the_tensor_is_seen():
    packed = good()
    dual_gemv(X, packed, T, 300)
    packed[64:68].view(torch.int32)[0] = 1 << 30
    with pytest.raises(KernelError, match="malformed packed matrix"):
        dual_gemv(X, packed, T, 300)
