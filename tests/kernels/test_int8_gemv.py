"""int8 products: every tier against a second writing in numpy, bit for bit, and against float64; the layout."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gemv_cases import BACKENDS, BATCHES, FLOATS, backend, bits_of, exact, normal, threads
from gemv_cases import poisoned_results as poisoned

from gossamer.errors import KernelError
from gossamer.kernels import extension
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv import dispatch as halves
from gossamer.kernels.bitmask_gemv import layout, record
from gossamer.kernels.int8_gemv import dispatch
from gossamer.kernels.int8_gemv.dispatch import dense, describe, int8_gemv, pack, unpack

SHAPES = [(1, 1), (1, 63), (63, 1), (100, 63), (63, 100), (5, 4097), (2, 8200), (0, 5), (5, 0), (8, 256)]
SPARSITIES = [0.0, 0.3, 0.5, 0.9, 1.0]


class Matrix:
    """A random matrix: whole [rows, cols] with zeros where nothing is kept, scales, and both packed."""

    def __init__(self, rows: int, cols: int, sparsity: float, seed: int = 0, whole: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + rows + cols)
        self.mask = torch.rand(rows, cols, generator=generator) >= sparsity
        full = torch.randint(-128, 128, (rows, cols), generator=generator) if whole is None else whole
        self.values = full.to(torch.int8)[self.mask]
        self.whole = full * self.mask
        self.scales = (torch.rand(rows, -(-cols // 128), generator=generator) / 64).half()
        self.bits = bitmask.pack_bits(self.mask)
        self.cols = cols

    def packed(self) -> torch.Tensor:
        return pack(self.bits, self.values, self.scales, self.cols)

    def dense(self) -> torch.Tensor:
        """float64, exact."""
        return self.whole.double() * self.scales.double().repeat_interleave(128, 1)[:, : self.cols]


def by_numpy(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The definition once more: float32 in numpy, one rounding per operation, groups left to right."""
    rows = x.float().numpy()
    y = np.zeros((len(rows), len(matrix.whole)), np.float32)
    scales = matrix.scales.numpy().astype(np.float32)
    for b, row in enumerate(rows):
        for g, first in enumerate(range(0, matrix.cols, 128)):
            group = row[first : first + 128]
            largest = np.abs(group).max()
            if not np.isfinite(largest):
                y[b] = np.nan
                continue
            numbers, scale = np.zeros(len(group), np.int64), np.float32(0)
            if largest >= np.float32(2.0**-100):
                scale = largest / np.float32(127)
                numbers = np.rint(group * (np.float32(127) / largest)).astype(np.int64)
            assert np.abs(numbers).max() <= 127
            dots = matrix.whole[:, first : first + 128].numpy().astype(np.int64) @ numbers
            y[b] = y[b] + (dots.astype(np.float32) * scales[:, g]) * scale
    return torch.from_numpy(y).to(x.dtype)


def assert_within(y: torch.Tensor, x: torch.Tensor, matrix: Matrix) -> None:
    """|y - x W^T| within what quantising x, float32 sums and one rounding may lose.

    A number of x moves by half a step of its group, largest / 127, and by less than 2^-14 steps more, because the two
    factors and the product are rounded. A term of a group is rounded twice, and then once for every group after it.
    """
    wide, weight = x.double(), matrix.dense()
    steps = torch.stack([part.abs().amax(1) for part in wide.split(128, 1)], 1) / 127
    moved = (steps * (0.5 + 2.0**-14)).repeat_interleave(128, 1)[:, : matrix.cols]
    truth, size = wide @ weight.t(), (wide.abs() + moved) @ weight.abs().t()
    allowed = moved @ weight.abs().t() + (steps.shape[1] + 4) * 2.0**-24 * size
    allowed += torch.finfo(y.dtype).eps * truth.abs() + torch.finfo(y.dtype).smallest_normal
    worst = ((y.double() - truth).abs() / allowed).max().item()
    assert worst <= 1.0, f"{worst:.2f} times the allowed error"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_bits_as_the_second_writing(name, dtype, monkeypatch):
    with backend(name), poisoned(monkeypatch):
        for index, (rows, cols) in enumerate(SHAPES):
            for batch, sparsity in zip(BATCHES, SPARSITIES[index % 5 :] + SPARSITIES[: index % 5], strict=True):
                matrix = Matrix(rows, cols, sparsity)
                x = normal(batch, cols, dtype=dtype, seed=batch)
                y, wanted = int8_gemv(x, matrix.packed(), rows), by_numpy(x, matrix)
                assert torch.equal(y, wanted), (rows, cols, batch, sparsity)
                assert torch.equal(torch.signbit(y), torch.signbit(wanted))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_batch_at_every_sparsity(name, sparsity):
    matrix = Matrix(13, 300, sparsity)
    with backend(name):
        for batch in range(1, 9):
            x = normal(batch, 300, dtype=torch.bfloat16, seed=batch)
            assert torch.equal(int8_gemv(x, matrix.packed(), 13), by_numpy(x, matrix))


@pytest.mark.parametrize("name", BACKENDS)
def test_whole_numbers_are_exact(name):
    """x of whole numbers whose largest is 127 in every group is its own quantisation."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(-7, 8, (9, 4500), generator=generator)
    x = torch.randint(-126, 127, (3, 4500), generator=generator).float()
    x[:, ::128] = 127.0
    matrix = Matrix(9, 4500, 0.5, whole=whole)
    matrix.scales.fill_(0.25)
    with backend(name):
        assert torch.equal(int8_gemv(x, matrix.packed(), 9), exact(x, matrix.dense().float()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_within_what_quantisation_may_lose(name, dtype):
    matrix, x = Matrix(33, 4097, 0.5, seed=3), normal(3, 4097, dtype=dtype, seed=4)
    with backend(name):
        assert_within(int8_gemv(x, matrix.packed(), 33), x, matrix)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_largest_sums_do_not_saturate(name, value, sign):
    matrix = Matrix(4, 256, 0.0, whole=torch.full((4, 256), value))
    matrix.scales.fill_(1.0)
    with backend(name):
        y = int8_gemv(torch.full((2, 256), 127.0 * sign), matrix.packed(), 4)
    assert y.tolist() == [[256 * 127 * sign * value] * 4] * 2


@pytest.mark.parametrize("name", BACKENDS)
def test_ties_go_to_the_even_number(name):
    whole = torch.eye(8, dtype=torch.int64)
    matrix = Matrix(8, 8, 0.0, whole=whole)
    matrix.scales.fill_(1.0)
    with backend(name):
        y = int8_gemv(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.51]), matrix.packed(), 8)
    assert y.tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -126.0, 1.0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_same_bits_for_any_threads_and_any_company(name, dtype):
    matrix, x = Matrix(259, 5000, 0.5, seed=5), normal(8, 5000, dtype=dtype, seed=6)
    packed = matrix.packed()
    with backend(name), threads(1):
        together = int8_gemv(x, packed, 259)
        alone = torch.cat([int8_gemv(row[None], packed, 259) for row in x])
    assert torch.equal(bits_of(alone), bits_of(together))
    for count in (2, 3, 4):
        with backend(name), threads(count):
            assert torch.equal(bits_of(int8_gemv(x, packed, 259)), bits_of(together)), count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_infinity_and_nan_in_x_make_nan_of_the_whole_row(name, dtype):
    inf, nan = float("inf"), float("nan")
    matrix = Matrix(5, 300, 1.0)
    x = torch.ones(4, 300, dtype=dtype)
    x[1, 7], x[2, 299], x[3, 130] = inf, nan, -inf
    with backend(name):
        y = int8_gemv(x, matrix.packed(), 5)
    assert y.isnan().all(1).tolist() == [False, True, True, True]
    assert torch.equal(y[0], torch.zeros(5, dtype=dtype))


@pytest.mark.parametrize("name", BACKENDS)
def test_tiny_and_huge_numbers(name):
    """Below 2^-100 a group counts as zeros: the reciprocal of its step could overflow. Above, float32 is enough."""
    matrix = Matrix(3, 256, 0.0, whole=torch.ones(3, 256, dtype=torch.int64))
    matrix.scales.fill_(1.0)
    x = torch.zeros(6, 256)
    x[0, :128], x[1, :128], x[2, 5], x[3, 5], x[4] = 2.0**-100, 1.9 * 2.0**-101, 1e-45, 3e38, -0.0
    x[5, :128], x[5, 128:] = 2.0**-126, 1.0
    with backend(name):
        y = int8_gemv(x, matrix.packed(), 3)
    assert torch.equal(y, by_numpy(x, matrix))
    assert y[:, 0].tolist() == pytest.approx([2.0**-93, 0.0, 0.0, 3e38, 0.0, 128.0], rel=1e-6)
    assert not torch.signbit(y).any()


# ---- the layout ----


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_packing_is_lossless_and_both_writings_agree(sparsity, monkeypatch):
    for rows, cols in SHAPES:
        matrix = Matrix(rows, cols, sparsity, seed=7)
        packed = matrix.packed()
        assert torch.equal(packed, layout.pack(matrix.bits, matrix.values, cols, matrix.scales))
        layout.check(packed)
        found = [unpack(packed)]
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "compiled", lambda: None)
            found.append(unpack(packed))
        for bits, values, scales, width in found:
            assert torch.equal(bits, matrix.bits)
            assert torch.equal(values, matrix.values)
            assert torch.equal(scales.view(torch.int16), matrix.scales.view(torch.int16))
            assert (values.dtype, width) == (torch.int8, cols)
        told = describe(packed)
        assert (told.rows, told.cols, told.nnz, told.dtype) == (rows, cols, len(matrix.values), torch.int8)


def test_layout_written_by_hand():
    """One tile: row 0 keeps columns 0 and 9, row 1 keeps column 7, rows 2 and 3 are beyond the matrix."""
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = mask[1, 7] = True
    scales = torch.tensor([[1.0], [2.0]]).half()
    packed = pack(bitmask.pack_bits(mask), torch.tensor([-128, 0, 127], dtype=torch.int8), scales, 10)
    words = packed[:80].view(torch.int64)
    assert words[:8].tolist() == [layout.MAGIC, 2, 10, 3, 3, 128, 128, len(packed)]
    assert words[8:10].tolist() == [0, 75]
    assert packed[128:130].tolist() == [1, 2]
    assert packed[144:146].tolist() == [128, 0]
    assert int(packed[128:192].count_nonzero()) == 3
    assert packed[192:200].view(torch.float16).tolist() == [1.0, 2.0, 0.0, 0.0]
    assert packed[200:203].tolist() == [0, 128, 255]
    assert packed[203:].tolist() == [0] * 64


def test_size_is_what_the_readme_says():
    matrix = Matrix(256, 8192, 0.5)
    n, nnz, offsets = 256 * 8192, len(matrix.values), 8 * (2 * 64 + 1)
    packed = matrix.packed()
    assert len(packed) == -(-(64 + offsets) // 64) * 64 + n // 8 + n // 64 + nnz + 64
    assert 8 * len(packed) < 5.15 * n


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_is_the_matrix_rounded_once(dtype):
    matrix = Matrix(31, 300, 0.4)
    matrix.scales[3, 1] = 0.0
    wanted = torch.where(matrix.mask, matrix.dense().float().to(dtype), torch.zeros((), dtype=dtype))
    negative_zero = matrix.mask & (matrix.whole < 0) & (matrix.dense() == 0)
    assert negative_zero.any()
    found = dense(matrix.packed(), dtype)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.signbit(found) & (found == 0), negative_zero & (found == 0))


# ---- what cannot be right ----


def good() -> torch.Tensor:
    return Matrix(9, 300, 0.5).packed()


def altered(at: int, kind: torch.dtype, value: int) -> torch.Tensor:
    packed = good()
    packed[at : at + kind.itemsize].view(kind)[0] = value
    return packed


STREAM = layout.Shape(9, 300, True).stream


def with_stray_scale() -> torch.Tensor:
    """In the first tile of the last four rows, of which only one is inside the matrix."""
    packed = good()
    packed[STREAM + int(packed[64:88].view(torch.int64)[2]) + 64 + 2] = 1
    return packed


@pytest.mark.parametrize("written", ["compiled", "torch"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: good()[:40], "shorter than its header"),
        (lambda: altered(24, torch.int64, 4), "neither bfloat16, float16 nor int8"),
        (lambda: altered(24, torch.int64, 1), "length"),
        (lambda: altered(32, torch.int64, 9 * 300 + 1), "number of values"),
        (lambda: altered(72, torch.int64, -5), "offsets are out of order"),
        (lambda: altered(72, torch.int64, 1 << 50), "offsets are out of order|reaches beyond"),
        (lambda: altered(STREAM + 64, torch.int16, 0x7C00), "scale is negative or not finite"),
        (lambda: altered(STREAM + 64, torch.int16, 0x7E00), "scale is negative or not finite"),
        (lambda: altered(STREAM + 66, torch.int16, -0x8000), "scale is negative or not finite"),
        (with_stray_scale, "scales are set outside"),
    ],
)
def test_malformed_packed_tensors_are_refused(written, make, message, monkeypatch):
    if written == "torch":
        monkeypatch.setattr(record, "compiled", lambda: None)
    elif extension.compiled() is None:
        pytest.skip("no compiled module")
    with pytest.raises(KernelError, match=message):
        int8_gemv(X, make(), 9)


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
    assert 100 < healthy < 300


X = torch.ones(1, 300, dtype=torch.bfloat16)
NONE = torch.zeros(1, 1, dtype=torch.uint8)


def of_halves() -> torch.Tensor:
    matrix = Matrix(9, 300, 0.5)
    return halves.pack(matrix.bits, matrix.values.bfloat16(), 300)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: int8_gemv(X.double(), p, 9), "float64, allowed: float32, bfloat16, float16"),
        (lambda p: int8_gemv(X.char(), p, 9), "int8, allowed"),
        (lambda p: int8_gemv(X[:, :299], p, 9), "last length must be 300"),
        (lambda p: int8_gemv(X, p, 8), "has 9 rows, the call says 8"),
        (lambda p: int8_gemv(X.expand(9, 300), p, 9), "9 rows, 1 to 8"),
        (lambda p: int8_gemv(X.expand(2, 300), p, 9), "strides"),
        (lambda p: int8_gemv(X.clone().requires_grad_(), p, 9), "requires a gradient"),
        (lambda p: int8_gemv(X, p.view(1, -1), 9), r"uint8 \[size\]"),
        (lambda p: int8_gemv(X, of_halves(), 9), "bfloat16 values, int8 ones are needed.*bitmask_gemv"),
        (lambda p: halves.bitmask_gemv(X, p, 9), "int8 values, bfloat16 or float16 ones are needed.*int8_gemv"),
        (lambda p: halves.dense(p), "int8 values"),
        (lambda p: dense(of_halves(), torch.float32), "bfloat16 values"),
        (lambda p: dense(p, torch.float64), "float64, allowed"),
        (lambda p: dispatch.int8_dense(p, 9, 299, torch.float32), r"is \[9, 300\], the call says \[9, 299\]"),
        (lambda p: pack(NONE, torch.zeros(0), torch.ones(1, 1).half(), 8), "must be int8 and float16"),
        (lambda p: pack(NONE, torch.zeros(0).char(), torch.ones(1, 1), 8), "must be int8 and float16"),
        (lambda p: pack(NONE, torch.zeros(1).char(), torch.ones(1, 1).half(), 8), "1 values for 0 set bits"),
        (lambda p: pack(NONE, torch.zeros(0).char(), torch.ones(1, 2).half(), 8), r"needs \[1, 1\]"),
        (lambda p: pack(NONE, torch.zeros(0).char(), torch.full((1, 1), -0.0).half(), 8), "negative or not finite"),
        (lambda p: pack(NONE, torch.zeros(0).char(), torch.full((1, 1), 1e9).half(), 8), "negative or not finite"),
        (lambda p: pack(NONE.to("meta"), torch.zeros(0).char(), torch.ones(1, 1).half(), 8), "on the CPU"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(KernelError, match=f"(?s){message}"):
        call(good())


def test_other_memory_and_writes_are_checked_anew(monkeypatch):
    real, seen = record._fault, []
    monkeypatch.setattr(record, "_fault", lambda packed: seen.append(len(packed)) or real(packed))
    packed = good()
    wanted = int8_gemv(X, packed, 9)
    assert torch.equal(int8_gemv(X, packed.detach(), 9), wanted)
    assert len(seen) == 1
    assert torch.equal(int8_gemv(X, copy.deepcopy(packed), 9), wanted)
    assert len(seen) == 2
    packed[72:80].view(torch.int64)[0] = 1 << 40
    with pytest.raises(KernelError, match="malformed packed matrix"):
        int8_gemv(X, packed, 9)


def test_plain_torch_packs_the_same_tensor(monkeypatch):
    with_module = good()
    monkeypatch.setattr(dispatch, "compiled", lambda: None)
    assert torch.equal(good(), with_module)
    assert torch.equal(dense(with_module, torch.float32), Matrix(9, 300, 0.5).dense().float())
