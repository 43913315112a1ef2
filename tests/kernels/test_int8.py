"""int8 values with float16 scales: against numpy, at the edges of float16, and back from weights to the same values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import bits_of, same_bits
from int8_cases import quantised, weights

from gossamer.errors import KernelError
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.int8 import dispatch, reference
from gossamer.kernels.int8.dispatch import dequantise, group_scales, quantise, round_to

SHAPES = [(0, 5), (3, 0), (1, 1), (1, 128), (2, 63), (3, 129), (5, 100), (7, 384), (2, 4097)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TINY = 2.0**-24  # the smallest float16


@pytest.fixture(params=["compiled", "torch"])
def backend(request, monkeypatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(bitmask, "compiled", lambda: None)


def random(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Weights whose size differs from row to row by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-6, 3, (rows, 1), generator=generator)
    return (torch.randn(rows, cols, generator=generator) * size).to(dtype)


def kept_of(rows: int, cols: int, share: float, seed: int = 1) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < share


def one(values: list[float], dtype: torch.dtype = torch.float32) -> tuple[list[int], float, torch.Tensor]:
    """Values, scale and weights again of one group that is kept as a whole."""
    weight = torch.tensor([values], dtype=dtype)
    bits = bits_of(torch.ones(weight.shape, dtype=torch.bool))
    codes, scales = quantise(weight, bits)
    return codes.tolist(), float(scales), dequantise(codes, scales, bits, len(values), dtype)[0]


def test_by_hand():
    """127 is the largest: scale 1. Halves go to the even neighbour; what is not kept is nothing."""
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5, float("nan"), -0.4, 3.0]])
    bits = torch.tensor([[0b1101111]], dtype=torch.uint8)
    codes, scales = quantise(weight, bits)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float16)
    assert codes.tolist() == [127, 0, 2, -2, 0, 3]
    assert scales.tolist() == [[1.0]]
    again = dequantise(codes, scales, bits, 7, torch.bfloat16)
    assert same_bits(again, torch.tensor([[127.0, 0, 2, -2, 0, 0, 3]]).bfloat16())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy(backend, shape, dtype, share):
    weight, kept = random(*shape, dtype), kept_of(*shape, share)
    bits = bits_of(kept)
    codes, scales = quantise(weight, bits)
    wanted, wanted_scales = quantised(weight, kept)
    assert np.array_equal(scales.numpy().view(np.uint16), wanted_scales.view(np.uint16))
    assert np.array_equal(codes.numpy(), wanted[kept.numpy()])
    assert torch.equal(group_scales(weight, bits), scales)
    again = dequantise(codes, scales, bits, shape[1], dtype)
    assert same_bits(again, weights(wanted, wanted_scales, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_half_a_scale(dtype):
    weight = random(40, 300, dtype)
    bits = bits_of(torch.ones(weight.shape, dtype=torch.bool))
    codes, scales = quantise(weight, bits)
    per_input = scales.double().repeat_interleave(128, 1)[:, :300]
    error = (weight.double() - codes.view(40, 300).double() * per_input).abs()
    assert bool((error <= per_input / 2 * (1 + 2**-16)).all())
    assert float((error / per_input).max()) > 0.45
    assert int(codes.abs().max()) == 127


def test_groups_are_apart():
    """The largest weight of one group does not touch its neighbours, in the row or in the next one."""
    weight = torch.full((2, 257), 0.25)
    weight[0, 128] = 1000.0
    codes, scales = quantise(weight, bits_of(torch.ones(2, 257, dtype=torch.bool)))
    codes = codes.view(2, 257)
    assert codes[0, :128].tolist() == [127] * 128
    assert codes[0, 128:256].tolist() == [127, *([0] * 127)]
    assert codes[0, 256] == 127
    assert codes[1].tolist() == [127] * 257
    assert float(scales[0, 1]) == 7.875  # 1000 / 127, rounded up


@pytest.mark.parametrize(
    ("values", "codes", "scale"),
    [
        ([0.0, -0.0], [0, 0], 0.0),
        ([127 * TINY, TINY, -TINY], [127, 1, -1], TINY),
        ([64 * TINY, TINY], [64, 1], TINY),
        ([TINY / 2, TINY], [0, 1], TINY),  # the half goes to even
        ([TINY / 2], [0], TINY),
        ([1e-44], [0], 0.0),  # a 127th of it is no float32 any more
        ([128 * TINY, TINY], [64, 0], 2 * TINY),
        ([127 * 65504.0, -65504.0], [127, -1], 65504.0),
    ],
)
def test_edges_of_float16(values, codes, scale):
    found, found_scale, again = one(values)
    assert (found, found_scale) == (codes, scale)
    assert again.tolist() == [code * scale for code in codes]
    assert not bool(torch.signbit(again[torch.tensor(codes) == 0]).any())


def test_the_largest_float16_weight_stays_finite():
    """A scale of 516 would make 127 * 516 = 65532, which float16 rounds to infinity."""
    codes, scale, again = one([65504.0, -65504.0, 300.0], torch.float16)
    assert (codes, scale, again.tolist()) == ([127, -127, 1], 515.5, [65472.0, -65472.0, 515.5])
    assert one([65504.0], torch.float32)[1] == 516.0
    assert bool(torch.tensor(127 * 516.0).half().isinf())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 127 * 65504.0 + 1])
def test_what_no_scale_can_hold(bad):
    weight = torch.tensor([[1.0] * 130, [2.0] * 130], dtype=torch.float64)
    weight[1, 129] = bad
    kept = torch.ones(2, 130, dtype=torch.bool)
    with pytest.raises(KernelError, match="finite weights up to 8.31901e"):
        quantise(weight, bits_of(kept))
    with pytest.raises(KernelError, match="a kept weight is inf"):
        quantise(weight.fill_(1e300), bits_of(kept))
    kept[1, 129] = False
    weight = torch.ones(2, 130, dtype=torch.float64)
    weight[1, 129] = bad
    codes, scales = quantise(weight, bits_of(kept))
    assert codes.tolist() == [127] * 259
    assert len(set(scales.flatten().tolist())) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_from_weights_for_every_scale(dtype):
    """Exhaustive: all positive float16 scales that are allowed, times all values."""
    scales = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    scales = scales[scales <= reference.limit(dtype)]
    codes = torch.arange(-127, 128, dtype=torch.int8)
    rows = len(scales)
    bits = torch.full((rows, 32), 0xFF, dtype=torch.uint8)
    bits[:, -1] = 0x7F
    both = scales[:, None].expand(rows, 2).contiguous()
    weight = dequantise(codes.repeat(rows), both, bits, 255, dtype)
    assert bool(weight.isfinite().all())
    assert torch.equal(round_to(both, weight, bits).view(rows, 255), codes.expand(rows, 255))


def test_new_scales_may_be_others():
    """Why scales are kept: rounding bfloat16 weights anew is not always the same rounding."""
    weight = random(2000, 128, torch.bfloat16)
    bits = torch.full((2000, 16), 0xFF, dtype=torch.uint8)
    codes, scales = quantise(weight, bits)
    again = dequantise(codes, scales, bits, 128, torch.bfloat16)
    assert not torch.equal(group_scales(again, bits), scales)
    assert torch.equal(round_to(scales, again, bits), codes)


def test_given_scales_take_any_weight():
    weight = torch.tensor([[1e30, -float("inf"), float("nan"), 1.4, 5.0]])
    scales, bits = torch.ones(1, 1, dtype=torch.float16), torch.tensor([[0b11111]], dtype=torch.uint8)
    assert round_to(scales, weight, bits).tolist() == [127, -127, 0, 1, 5]
    assert round_to(scales * 0, weight[:, 3:], bits >> 3).tolist() == [0, 0]


def test_pieces_memory_and_views_do_not_matter(monkeypatch):
    weight, kept = random(130, 37, torch.bfloat16).t(), kept_of(130, 37, 0.5).t()
    bits = bits_of(kept.contiguous())
    codes, scales = quantise(weight, bits)
    again = dequantise(codes, scales, bits, 130, torch.bfloat16)
    monkeypatch.setattr(dispatch, "_PIECE", 300)
    real = torch.empty

    def poisoned(*size, **options):
        tensor = real(*size, **options)
        return tensor.fill_(99) if tensor.numel() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(quantise(weight, bits)[0], codes)
    assert torch.equal(quantise(torch.nn.Parameter(weight), bits)[1], scales)
    assert same_bits(dequantise(codes, scales, bits, 130, torch.bfloat16), again)


BITS = torch.tensor([[0b101]], dtype=torch.uint8)
CODES = torch.tensor([3, -127], dtype=torch.int8)
ONE = torch.ones(1, 1, dtype=torch.float16)


def back(codes=CODES, scales=ONE, bits=BITS, cols=3, dtype=torch.float16):
    return dequantise(codes, scales, bits, cols, dtype)


def test_the_good_one_is_taken():
    assert back().tolist() == [[3.0, 0.0, -127.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantise(torch.ones(1, 3, dtype=torch.int32), BITS), "of bfloat16, float16, float32, float64"),
        (lambda: quantise(torch.ones(3), BITS), r"\[rows, cols\]"),
        (lambda: quantise(torch.ones(2, 3), BITS), r"bits must be uint8 \[2, 1\]"),
        (lambda: quantise(torch.ones(1, 9), BITS), r"bits must be uint8 \[1, 2\]"),
        (lambda: quantise(torch.ones(1, 3), BITS.int()), "bits must be uint8"),
        (lambda: quantise(torch.ones(1, 2), BITS), "beyond column 1"),
        (lambda: quantise(torch.ones(1, 3, device="meta"), BITS), "same device"),
        (lambda: round_to(ONE.float(), torch.ones(1, 3), BITS), "scales must be float16"),
        (lambda: back(codes=CODES.short()), "allowed: int8"),
        (lambda: back(codes=CODES[:1]), "1 values for 2 set bits"),
        (lambda: back(codes=torch.tensor([0, -128], dtype=torch.int8)), "-128"),
        (lambda: back(bits=BITS | 8), "beyond column 2"),
        (lambda: back(cols=9), r"\[rows, 2\]"),
        (lambda: back(dtype=torch.float8_e4m3fn), "float8"),
        (lambda: back(scales=ONE.bfloat16()), r"scales must be float16 \[1, 1\]"),
        (lambda: back(scales=ONE[0]), r"scales must be float16 \[1, 1\]"),
        (lambda: back(scales=ONE.expand(1, 2)), r"scales must be float16 \[1, 1\]"),
        (lambda: back(scales=-ONE), "numbers from 0 to 515.5"),
        (lambda: back(scales=-0.0 * ONE), "numbers from 0 to 515.5"),
        (lambda: back(scales=516 * ONE), "numbers from 0 to 515.5"),
        (lambda: back(scales=ONE / 0), "numbers from 0 to 515.5"),
        (lambda: back(scales=ONE / 0, dtype=torch.float32), "numbers from 0 to 65504"),
        (lambda: back(scales=0 * ONE / 0), "numbers from 0"),
        (lambda: back(scales=0 * ONE), "not 0 in a group whose scale is 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()
