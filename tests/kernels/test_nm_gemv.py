"""N:M matrices with fixed stride: the layout, its inverse, the reference. `test_triton` has the kernels."""

from __future__ import annotations

import pytest
import torch
from gemv_cases import BATCHES, HALVES, assert_close, exact, integers, normal

from gossamer.errors import KernelError
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.nm_gemv.dispatch import PATTERNS, nm_gemv, pack, unpack

SHAPES = [(1, 1), (1, 63), (100, 63), (63, 100), (2, 4097), (0, 5), (5, 0), (8, 256)]


def mask_of(rows: int, cols: int, keep: int, group: int) -> torch.Tensor:
    """At most `keep` of every `group`: none, fewer and all of them occur."""
    generator = torch.Generator().manual_seed(rows)
    groups = -(-cols // group)
    rank = torch.rand(rows, groups, group, generator=generator).argsort(-1).argsort(-1)
    limit = torch.randint(0, keep + 1, (rows, groups, 1), generator=generator)
    limit[:, ::2] = keep
    return (rank < limit).flatten(1)[:, :cols]


def matrix(weight: torch.Tensor, mask: torch.Tensor, keep: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits = bitmask.pack_bits(mask)
    return bits, pack(bits, bitmask.compress(weight, bits), weight.shape[1], keep, group)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_numbers_are_exact(pattern, dtype):
    for index, (rows, cols) in enumerate(SHAPES):
        weight, mask = integers(rows, cols, dtype=dtype, seed=1), mask_of(rows, cols, *pattern)
        x = integers(BATCHES[index % 5], cols, dtype=dtype, seed=2)
        assert torch.equal(nm_gemv(x, *matrix(weight, mask, *pattern), *pattern), exact(x, weight * mask))


def test_within_the_rounding_of_float32():
    weight, mask = normal(9, 4096, dtype=torch.bfloat16, seed=3), mask_of(9, 4096, 2, 4)
    x = normal(3, 4096, dtype=torch.bfloat16, seed=4)
    assert_close(nm_gemv(x, *matrix(weight, mask, 2, 4), 2, 4), x, weight * mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packing_is_lossless(pattern):
    """Any bits as values, NaN payloads and -0.0 included, and groups that keep fewer than they may."""
    for rows, cols in SHAPES:
        mask = mask_of(rows, cols, *pattern)
        raw = torch.randint(-(2**15), 2**15, (rows, cols), generator=torch.Generator().manual_seed(cols))
        kept = raw.to(torch.int16)[mask].view(torch.float16)
        bits = bitmask.pack_bits(mask)
        values = pack(bits, kept, cols, *pattern)
        assert values.shape == (rows, -(-cols // 8) * 8 * pattern[0] // pattern[1])
        assert torch.equal(unpack(bits, values, cols, *pattern).view(torch.int16), kept.view(torch.int16))


def test_layout_written_by_hand():
    mask = torch.tensor([[0, 1, 0, 1, 0, 0, 1, 0, 1, 1]], dtype=torch.bool)
    bits = bitmask.pack_bits(mask)
    values = pack(bits, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).half(), 10, 2, 4)
    assert bits.tolist() == [[0b01001010, 0b11]]
    assert values.tolist() == [[1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 0.0, 0.0]]


def test_bits_beyond_the_first_ones_of_a_group_count_as_pruned():
    codes, values = torch.tensor([[0b11111111]], dtype=torch.uint8), torch.tensor([[1.0, 2.0, 4.0, 8.0]]).half()
    x = torch.tensor([1.0, 10.0, 100.0, 100.0, 1.0, 10.0, 100.0, 100.0]).half()
    assert nm_gemv(x, codes, values, 2, 4).tolist() == [1 + 20 + 4 + 80]
    x[2] = float("inf")  # a pruned entry is +0.0
    assert nm_gemv(x, codes, values, 2, 4).isnan().all()


X = torch.ones(1, 16, dtype=torch.float16)
CODES = torch.zeros(3, 2, dtype=torch.uint8)
VALUES = torch.zeros(3, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm_gemv(X.bfloat16(), CODES, VALUES, 2, 4), "x is bfloat16, the weight float16"),
        (lambda: nm_gemv(X, CODES, VALUES.float(), 2, 4), "values are float32, allowed: bfloat16 and float16"),
        (lambda: nm_gemv(X, CODES, VALUES, 3, 4), "3:4 has no fixed stride, allowed: 1:2, 2:4.*bitmask_gemv"),
        (lambda: nm_gemv(X, CODES, VALUES, 1, 4), r"values have shape \[3, 8\], 1:4 needs \[3, 4\]"),
        (lambda: nm_gemv(X[:, :8], CODES, VALUES, 2, 4), r"codes are uint8 \[3, 2\], x needs uint8 \[rows, 1\]"),
        (lambda: nm_gemv(X, CODES.int(), VALUES, 2, 4), r"codes are int32"),
        (lambda: nm_gemv(X, CODES, VALUES.t().contiguous().t(), 2, 4), "must be contiguous"),
        (lambda: nm_gemv(X, CODES, torch.zeros(25).half()[1:].view(3, 8), 2, 4), "multiple of 8 bytes"),
        (lambda: nm_gemv(X.expand(9, 16).contiguous(), CODES, VALUES, 2, 4), "9 rows, 1 to 8"),
        (lambda: nm_gemv(X.clone().requires_grad_(), CODES, VALUES, 2, 4), "requires a gradient"),
        (lambda: pack(CODES | 7, torch.zeros(18).half(), 16, 2, 4), "a group of 4 keeps 3 weights, 2 are allowed"),
        (lambda: pack(CODES | 3, torch.zeros(9).half(), 16, 2, 4), "9 values for 12 set bits"),
        (lambda: unpack(CODES | 7, VALUES, 16, 2, 4), "a group of 4 has more than 2 bits"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()
