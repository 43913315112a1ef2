"""Bitmask products and their machine layout: every tier against float64, the layout against a second writing of it."""

from __future__ import annotations

import copy

import pytest
import torch
from gemv_cases import BACKENDS, BATCHES, HALVES, assert_close, backend, bits_of, exact, integers, normal, threads
from gemv_cases import poisoned_results as poisoned

from gossamer.errors import KernelError
from gossamer.kernels import extension
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv import dispatch, layout
from gossamer.kernels.bitmask_gemv.dispatch import bitmask_gemv, dense, describe, pack, unpack
from gossamer.kernels.bitmask_gemv.record import record_of

SHAPES = [(1, 1), (1, 63), (63, 1), (100, 63), (63, 100), (5, 4097), (2, 8200), (0, 5), (5, 0), (8, 256)]
SPARSITIES = [0.0, 0.3, 0.5, 0.9, 1.0]


def packed_of(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    bits = bitmask.pack_bits(mask)
    return pack(bits, bitmask.compress(weight, bits), weight.shape[1])


def mask_of(rows: int, cols: int, sparsity: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) >= sparsity


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS)
def test_whole_numbers_are_exact(name, dtype, monkeypatch):
    with backend(name), poisoned(monkeypatch):
        for index, (rows, cols) in enumerate(SHAPES):
            weight = integers(rows, cols, dtype=dtype, seed=1)
            for batch, sparsity in zip(BATCHES, SPARSITIES[index % 5 :] + SPARSITIES[: index % 5], strict=True):
                mask = mask_of(rows, cols, sparsity)
                x = integers(batch, cols, dtype=dtype, seed=batch, zeros=0.1)
                y = bitmask_gemv(x, packed_of(weight, mask), rows)
                assert torch.equal(y, exact(x, weight * mask)), (rows, cols, batch, sparsity)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_batch_at_every_sparsity(name, sparsity):
    weight, mask = integers(13, 300, dtype=torch.bfloat16, seed=1), mask_of(13, 300, sparsity)
    packed = packed_of(weight, mask)
    with backend(name):
        for batch in range(1, 9):
            x = integers(batch, 300, dtype=torch.bfloat16, seed=batch)
            assert torch.equal(bitmask_gemv(x, packed, 13), exact(x, weight * mask))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS)
def test_within_the_rounding_of_float32(name, dtype):
    weight, mask = normal(33, 4097, dtype=dtype, seed=3), mask_of(33, 4097, 0.5)
    x = normal(3, 4097, dtype=dtype, seed=4)
    with backend(name):
        assert_close(bitmask_gemv(x, packed_of(weight, mask), 33), x, weight * mask)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_same_bits_for_any_threads_and_any_company(name, dtype):
    weight, x = normal(259, 5000, dtype=dtype, seed=5), normal(8, 5000, dtype=dtype, seed=6)
    mask = mask_of(259, 5000, 0.5)
    mask[:100] = mask_of(100, 5000, 0.95)  # threads get equal bytes, so unequal rows
    packed = packed_of(weight, mask)
    with backend(name), threads(1):
        together = bitmask_gemv(x, packed, 259)
        alone = torch.cat([bitmask_gemv(row[None], packed, 259) for row in x])
    assert torch.equal(bits_of(alone), bits_of(together))
    for count in (2, 3, 4):
        with backend(name), threads(count):
            assert torch.equal(bits_of(bitmask_gemv(x, packed, 259)), bits_of(together)), count


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (4, 8)])
def test_fixed_groups_are_masks_like_any_other(pattern):
    keep, group = pattern
    scores = torch.rand(24, 64 // group, group, generator=torch.Generator().manual_seed(1))
    mask = (scores.argsort(-1).argsort(-1) < keep).view(24, 64)
    weight, x = integers(24, 64, dtype=torch.float16, seed=2), integers(1, 64, dtype=torch.float16, seed=3)
    packed = packed_of(weight, mask)
    assert describe(packed).nnz == 24 * 64 * keep // group
    assert torch.equal(bitmask_gemv(x, packed, 24), exact(x, weight * mask))


@pytest.mark.parametrize("dtype", HALVES)
def test_negative_zero_is_kept_and_sums_as_zero(dtype):
    weight = torch.full((4, 128), -0.0, dtype=dtype)
    packed = packed_of(weight, mask_of(4, 128, 0.5))
    assert torch.signbit(dense(packed)).sum() == mask_of(4, 128, 0.5).sum()
    for name in BACKENDS[1:]:
        with backend(name):
            assert torch.equal(bitmask_gemv(torch.ones(1, 128, dtype=dtype), packed, 4), torch.zeros(1, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS)
def test_infinity_and_nan_as_in_the_dense_matrix(name, dtype):
    """A pruned entry is +0.0, not absent: an infinity in x meets it. A kept infinity stays one."""
    inf, nan = float("inf"), float("nan")
    weight = torch.zeros(5, 40, dtype=dtype)
    mask = torch.zeros(5, 40, dtype=torch.bool)
    mask[0], mask[1, 3], mask[2, 4], mask[3, :9] = True, True, True, True
    weight[0], weight[1, 3], weight[2, 4], weight[3, 8] = 1.0, -inf, nan, 2.0
    packed = packed_of(weight, mask)
    finite = torch.ones(40, dtype=dtype)
    x = torch.stack([finite, finite.clone(), finite.clone()])
    x[1, 7], x[2, 9] = inf, nan
    with backend(name):
        y = bitmask_gemv(x, packed, 5)
    assert y[0].nan_to_num(7.0, posinf=8.0, neginf=9.0).tolist() == [40.0, 9.0, 7.0, 2.0, 0.0]
    assert y[1].isnan().tolist() == [False, True, True, True, True]
    assert y[1, 0] == inf
    assert y[2].isnan().all()


# ---- the layout ----


@pytest.mark.parametrize(("sparsity", "dtype"), list(zip(SPARSITIES, HALVES * 3, strict=False)))
def test_packing_is_lossless_and_both_writings_agree(sparsity, dtype):
    """Any bits as values, NaN payloads included: C++ and torch pack the same bytes and unpack what was packed."""
    for rows, cols in SHAPES:
        mask = mask_of(rows, cols, sparsity, seed=rows)
        raw = torch.randint(-(2**15), 2**15, (rows, cols), generator=torch.Generator().manual_seed(cols))
        bits = bitmask.pack_bits(mask)
        values = raw.to(torch.int16).view(dtype)[mask]
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
    """One tile: row 0 keeps columns 0 and 9, row 1 keeps column 7, rows 2 and 3 are beyond the matrix."""
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = mask[1, 7] = True
    weight = torch.arange(20.0).view(2, 10).half()
    packed = packed_of(weight, mask)
    words = packed[:80].view(torch.int64)
    assert words[:8].tolist() == [layout.MAGIC, 2, 10, 2, 3, 128, 128, len(packed)]
    assert words[8:10].tolist() == [0, 35]
    assert packed[128:130].tolist() == [1, 2]
    assert packed[144:146].tolist() == [128, 0]
    assert int(packed[128:192].count_nonzero()) == 3
    assert packed[192:198].view(torch.float16).tolist() == [0.0, 9.0, 17.0]
    assert packed[198:].tolist() == [0] * 64


def test_size_is_what_the_readme_says():
    weight, mask = normal(256, 8192, dtype=torch.bfloat16, seed=1), mask_of(256, 8192, 0.5)
    packed = packed_of(weight, mask)
    n, nnz = weight.numel(), int(mask.sum())
    offsets = 8 * (2 * 64 + 1)
    assert len(packed) == -(-(64 + offsets) // 64) * 64 + n // 8 + 2 * nnz + 64
    assert len(packed) < 0.57 * 2 * n


def test_dense_is_the_matrix_bit_for_bit():
    weight, mask = normal(31, 200, dtype=torch.bfloat16, seed=1), mask_of(31, 200, 0.4)
    packed = packed_of(weight, mask)
    assert torch.equal(bits_of(dense(packed)), bits_of(torch.where(mask, weight, torch.zeros_like(weight))))


# ---- what cannot be right ----


def good() -> torch.Tensor:
    return packed_of(integers(9, 300, dtype=torch.bfloat16, seed=1), mask_of(9, 300, 0.5))


def altered(word: int, value: int) -> torch.Tensor:
    packed = good()
    packed[8 * word : 8 * word + 8].view(torch.int64)[0] = value
    return packed


def with_stray_bit() -> torch.Tensor:
    """One set bit beyond the columns instead of one inside, so that all counts stay."""
    packed = good()
    shape = layout.Shape(9, 300)
    offsets = packed[64 : 64 + 8 * shape.offsets].view(torch.int64)
    at = shape.stream
    for _ in range(2):  # the third tile of the first four rows holds columns 256 to 299
        at += 64 + 2 * int(bitmask.row_counts(packed[None, at : at + 64]))
    assert at < shape.stream + 2 * int(offsets[1])
    first = packed[at : at + 4].tolist()
    byte = next(i for i, value in enumerate(first) if value)
    packed[at + byte] = first[byte] & (first[byte] - 1)
    packed[at + 6] = 0x80
    return packed


@pytest.mark.parametrize("written", ["compiled", "torch"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: good()[:40], "shorter than its header"),
        (lambda: altered(0, 1), "not a packed matrix"),
        (lambda: altered(1, -1), "out of range"),
        (lambda: altered(2, 1 << 31), "out of range"),
        (lambda: altered(1, (1 << 31) - 1), "layout is another one"),
        (lambda: altered(3, 0), "neither bfloat16, float16 nor int8"),
        (lambda: altered(4, -1), "number of values"),
        (lambda: altered(4, 9 * 300 + 1), "number of values"),
        (lambda: altered(4, 100), "length"),
        (lambda: altered(5, 256), "layout is another one"),
        (lambda: altered(6, 64), "layout is another one"),
        (lambda: altered(7, 1 << 60), "length"),
        (lambda: good()[:-8].clone(), "length"),
        (lambda: torch.cat([good(), torch.zeros(8, dtype=torch.uint8)]), "length"),
        (lambda: altered(8, 1), "offsets are out of order"),
        (lambda: altered(9, -5), "offsets are out of order"),
        (lambda: altered(9, 1 << 50), "offsets are out of order|reaches beyond"),
        (lambda: altered(11, 3), "offsets are out of order|last offset"),
        (with_stray_bit, "outside the matrix"),
    ],
)
def test_malformed_packed_tensors_are_refused(written, make, message, monkeypatch):
    if written == "torch":
        monkeypatch.setattr("gossamer.kernels.bitmask_gemv.record.compiled", lambda: None)
    elif extension.compiled() is None:
        pytest.skip("no compiled module")
    with pytest.raises(KernelError, match=message):
        bitmask_gemv(torch.ones(1, 300, dtype=torch.bfloat16), make(), 9)


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
        found = module.tiles_fault(packed.data_ptr(), len(packed))
        assert (found is None) == (fault is None), (int(position), found, fault)
        healthy += fault is None
    assert 100 < healthy < 300  # most damage hits values, which may be anything


X = torch.ones(1, 300, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: bitmask_gemv(X.half(), p, 9), "x is float16, the weight bfloat16"),
        (lambda p: bitmask_gemv(X[:, :299], p, 9), "last length must be 300"),
        (lambda p: bitmask_gemv(X, p, 8), "has 9 rows, the call says 8"),
        (lambda p: bitmask_gemv(X.expand(9, 300), p, 9), "9 rows, 1 to 8"),
        (lambda p: bitmask_gemv(X.expand(2, 300), p, 9), "strides"),
        (lambda p: bitmask_gemv(X.clone().requires_grad_(), p, 9), "requires a gradient"),
        (lambda p: bitmask_gemv(X, p.view(1, -1), 9), r"uint8 \[size\]"),
        (lambda p: bitmask_gemv(X, p.view(torch.int16), 9), "int16"),
        (lambda p: bitmask_gemv(X, torch.cat([p[:1], p])[1:], 9), "multiple of 8"),
        (lambda p: bitmask_gemv(X, torch.stack([p, p], 1)[:, 0], 9), "strides"),
        (lambda p: pack(torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(0), 8), "float32, allowed: bfloat16 and"),
        (lambda p: pack(torch.ones(1, 1, dtype=torch.uint8), torch.zeros(0).half(), 8), "0 values for 1 set bits"),
        (lambda p: pack(torch.ones(1, 2, dtype=torch.uint8), torch.zeros(2).half(), 8), r"\[rows, 1\]"),
        (lambda p: pack(torch.zeros(1, 1, dtype=torch.uint8, device="meta"), torch.zeros(0).half(), 8), "on the CPU"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call(good())


# ---- the record: other memory is checked anew, the same memory is not ----


@pytest.fixture
def checks(monkeypatch):
    """Counts how often a packed tensor is read as a whole."""
    from gossamer.kernels.bitmask_gemv import record

    real, seen = record._fault, []
    monkeypatch.setattr(record, "_fault", lambda packed: seen.append(len(packed)) or real(packed))
    return seen


def test_the_same_memory_is_checked_once(checks):
    packed = good()
    wanted = bitmask_gemv(X, packed, 9)
    for other in (packed, packed.detach(), packed[:], packed.view(-1)):
        assert torch.equal(bitmask_gemv(X, other, 9), wanted)
    assert len(checks) == 1


def test_other_memory_and_writes_are_checked_anew(checks):
    module = torch.nn.Module()
    module.register_buffer("packed", good())
    wanted = bitmask_gemv(X, module.packed, 9)
    twin = copy.deepcopy(module)
    assert torch.equal(bitmask_gemv(X, twin.packed, 9), wanted)
    assert len(checks) == 2
    module.load_state_dict({"packed": good()})  # copies into the old memory
    assert torch.equal(bitmask_gemv(X, module.packed, 9), wanted)
    assert len(checks) == 3
    module.load_state_dict({"packed": good()}, assign=True)
    assert torch.equal(bitmask_gemv(X, module.packed, 9), wanted)
    assert len(checks) == 4
    module.to("meta")
    module.packed = good()
    module.double()  # floating point buffers only
    assert torch.equal(bitmask_gemv(X, module.packed, 9), wanted)
    with torch.inference_mode():
        assert torch.equal(bitmask_gemv(X, module.packed.clone(), 9), wanted)


def test_a_write_that_breaks_the_tensor_is_seen():
    packed = good()
    bitmask_gemv(X, packed, 9)
    packed[72:80].view(torch.int64)[0] = 1 << 40
    with pytest.raises(KernelError, match="malformed packed matrix"):
        bitmask_gemv(X, packed, 9)
    packed = good()
    bitmask_gemv(X, packed, 9)
    packed.untyped_storage().resize_(64)
    with pytest.raises((KernelError, RuntimeError)):
        bitmask_gemv(X, packed, 9)


def test_memory_that_is_used_again_is_checked_anew(checks):
    """The allocator likes to give the address of a freed tensor to the next one of its size."""
    for _ in range(20):
        packed = good()
        record_of(packed)
        del packed
    assert len(checks) == 20


def test_records_of_freed_memory_go():
    from gossamer.kernels.bitmask_gemv import record

    for _ in range(300):
        record_of(good())
    assert len(record.records) < 200


def test_plain_torch_gives_the_same_tensor(monkeypatch):
    with_module = good()
    monkeypatch.setattr(dispatch, "compiled", lambda: None)
    assert torch.equal(good(), with_module)
    assert torch.equal(dense(with_module), integers(9, 300, dtype=torch.bfloat16, seed=1) * mask_of(9, 300, 0.5))
