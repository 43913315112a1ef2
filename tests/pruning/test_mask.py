"""The mask object: packing, counts, application, identity."""

from __future__ import annotations

import pytest
import torch

from gossamer.pruning.mask import Mask


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (6, 20), (7, 17)])
def test_round_trip_and_count(shape: tuple[int, int]) -> None:
    keep = torch.rand(shape) > 0.4
    mask = Mask.from_bool(keep, "0.4")
    assert torch.equal(mask.to_bool(), keep)
    assert mask.shape == shape
    assert mask.zeros == int((~keep).sum())
    assert mask.bits.shape == (shape[0], (shape[1] + 7) // 8)


def test_bit_order_by_hand() -> None:
    keep = torch.zeros(1, 10, dtype=torch.bool)
    keep[0, [0, 3, 9]] = True
    assert Mask.from_bool(keep, "0.7").bits.tolist() == [[0b00001001, 0b00000010]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_writes_positive_zeros_and_keeps_bits(dtype: torch.dtype) -> None:
    keep = torch.tensor([[True, False, True], [False, True, True]])
    weight = torch.tensor([[-0.0, -2.0, 1.5], [-1.0, -0.0, 3.0]], dtype=dtype)
    before = weight.clone()
    result = Mask.from_bool(keep, "x").apply(weight)
    assert torch.equal(torch.signbit(result), torch.tensor([[True, False, False], [False, True, False]]))
    assert result.dtype == dtype
    assert result.tolist() == [[0.0, 0.0, 1.5], [0.0, 0.0, 3.0]]
    assert torch.equal(weight, before)


def test_digest_follows_the_bits() -> None:
    keep = torch.rand(5, 9) > 0.5
    other = keep.clone()
    other[4, 8] = ~other[4, 8]
    assert Mask.from_bool(keep, "a").sha256() == Mask.from_bool(keep.clone(), "b").sha256()
    assert Mask.from_bool(keep, "a").sha256() != Mask.from_bool(other, "a").sha256()


def test_equality_is_by_content() -> None:
    keep = torch.eye(4, dtype=torch.bool)
    assert Mask.from_bool(keep, "a") == Mask.from_bool(keep.clone(), "a")
    assert Mask.from_bool(keep, "a") != Mask.from_bool(~keep, "a")


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        Mask(torch.zeros(2, 2, dtype=torch.uint8), 8, "a")
    with pytest.raises(ValueError, match="weight"):
        Mask.from_bool(torch.ones(2, 3, dtype=torch.bool), "a").apply(torch.ones(3, 2))
