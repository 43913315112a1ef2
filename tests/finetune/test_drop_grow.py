"""Dropping and growing under a budget: moves worked out by hand, exact counts, structures kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gossamer.finetune.drop_grow import move, share_at
from gossamer.pruning.pattern import NM, Block, Unstructured


def kept(*rows: str) -> Tensor:
    return torch.tensor([[c == "x" for c in row.replace(" ", "")] for row in rows])


def shown(mask: Tensor) -> list[str]:
    return ["".join("x" if c else "." for c in row) for row in mask.tolist()]


W = torch.tensor([[0.1, -0.8, 0.0, 0.0, 0.0, 0.7, -0.6, 0.0], [-0.9, 0.0, 0.2, 0.0, 0.3, 0.0, 0.0, 0.5]])
G = torch.tensor([[9.0, 9.0, 0.4, -0.9, 0.2, 9.0, 9.0, 0.3], [9.0, 0.8, 9.0, 0.1, 9.0, -0.7, 0.6, 9.0]])
KEEP = kept("xx.. .xx.", "x.x. x..x")


def test_share_by_hand():
    assert share_at(0, 100, 0.3) == pytest.approx(0.3)
    assert share_at(50, 100, 0.3) == pytest.approx(0.15)
    assert share_at(25, 100, 0.4) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert share_at(100, 100, 0.3) == share_at(1, 0, 0.3) == 0.0


@pytest.mark.parametrize(
    ("share", "after"),
    [
        (0.1, ["xx...xx.", "x.x.x..x"]),  # 0.8 of a weight: none
        (0.125, [".x.x.xx.", "x.x.x..x"]),  # 0.1 goes, the slope -0.9 comes
        (0.25, [".x.x.xx.", "xx..x..x"]),  # then 0.2 goes and 0.8 comes
        (0.5, [".x.x.xx.", "xx...xx."]),  # 0.3 and 0.5 for -0.7 and 0.6
    ],
)
def test_a_move_by_hand(share, after):
    assert shown(move(W, G, KEEP, share)) == after
    assert shown(move(W, G, KEEP, share, Unstructured(0.5))) == after


def test_groups_of_an_nm_pattern_swap_inside():
    # 2:4. smallest kept per group: 0.1, 0.6, 0.2, 0.3; the best slope of the pruned: -0.9, 0.3, 0.8, -0.7
    assert shown(move(W, G, KEEP, 0.25, NM(2, 4))) == [".x.x.xx.", "xx..x..x"]
    assert shown(move(W, G, KEEP, 0.5, NM(2, 4))) == [".x.x.x.x", "xx...x.x"]
    assert shown(move(W, G, KEEP, 1.0, NM(2, 4))) == [".x.x.x.x", "xx...x.x"]  # one swap per group and move


def test_blocks_move_as_a_whole():
    keep = kept("xx..", "xx..", "..xx", "..xx")
    weight = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0.1, 2], [0, 0, 0.1, 0.1]])
    slope = torch.tensor([[9.0, 9, 1, 1], [9, 9, 1, 1], [0, 5, 9, 9], [0, 0, 9, 9]])  # sums 4 and 5
    assert shown(move(weight, slope, keep, 0.5, Block(2, 2))) == ["xx..", "xx..", "xx..", "xx.."]


@pytest.mark.parametrize("pattern", [None, NM(1, 4), Block(2, 4)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
def test_the_budget_holds(pattern, share):
    for seed in range(5):
        torch.manual_seed(seed)
        weight, slope = torch.randn(6, 16), torch.randn(6, 16)
        keep = NM(1, 4).mask(weight.abs()) if pattern != Block(2, 4) else Block(2, 4, 0.75).mask(weight.abs())
        before = keep.clone()
        moved = move(weight * keep, slope, keep, share, pattern)
        assert torch.equal(keep, before)
        assert int(moved.sum()) == int(keep.sum())
        assert int((moved & ~keep).sum()) == int((keep & ~moved).sum()) > 0 or share < 0.1 or isinstance(pattern, Block)
        if isinstance(pattern, NM):
            assert (moved.view(6, -1, 4).sum(-1) == 1).all()


@pytest.mark.parametrize("keep", [torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)])
@pytest.mark.parametrize("pattern", [None, NM(2, 4)])
def test_full_and_empty_masks_stand_still(keep, pattern):
    assert torch.equal(move(W, G, keep, 1.0, pattern), keep)


def test_more_to_move_than_there_is_room():
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[0, 2] = False
    moved = move(W, G, keep, 0.9)
    assert int(moved.sum()) == 15
    assert bool(moved[0, 2])
