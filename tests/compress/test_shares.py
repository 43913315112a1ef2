"""Which process does what: windows, parts of sums and slabs, and who ends first."""

from __future__ import annotations

import weakref

import pytest
import torch

from gossamer.compress import distributed
from gossamer.compress.sums import OuterSum


@pytest.fixture
def as_rank(monkeypatch):
    """Pretend to be one of several processes."""

    def pretend(rank: int, world: int) -> None:
        monkeypatch.setattr(distributed, "world", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda: rank)

    return pretend


def test_wrapped_models_end_before_their_group(monkeypatch):
    """The other way round, a process waits for its own network threads for ever."""

    class Wrapped:
        def __init__(self) -> None:
            self.trainer = self  # only a cycle holds it

    gone = weakref.ref(Wrapped())
    assert gone() is not None
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: alive.append(gone()))
    alive: list[object] = []
    distributed.leave()
    assert alive == [None]


@pytest.mark.parametrize(("count", "world"), [(5, 1), (5, 2), (7, 3), (2, 4), (6, 3)])
def test_every_window_has_one_owner_and_one_turn(as_rank, count, world):
    shares, turns = [], []
    for rank in range(world):
        as_rank(rank, world)
        shares.append(list(distributed.my_share(count)))
        turns.append(list(distributed.turns(count)))
        assert distributed.followed(count) == sorted({0, *shares[-1]})
        assert [window for window in turns[-1] if window is not None] == shares[-1]
    assert sorted(window for share in shares for window in share) == list(range(count))
    assert len({len(turn) for turn in turns}) == 1
    in_order = [turn[k] for k in range(len(turns[0])) for turn in turns]
    assert [window for window in in_order if window is not None] == list(range(count))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_a_sum_are_exactly_the_sum(as_rank, monkeypatch, symmetric, world):
    """Every rank adds up its own slabs; one rank's entries and the others' zeros are the whole."""
    monkeypatch.setattr("gossamer.compress.sums.SLAB", 8)
    monkeypatch.setattr(distributed, "sum_", lambda tensor: tensor)
    windows = [(torch.randn(13, 37), torch.randn(13, 37 if symmetric else 21)) for _ in range(4)]

    def total() -> torch.Tensor:
        summed = OuterSum(37, 37 if symmetric else 21, torch.device("cpu"), symmetric=symmetric)
        for a, b in windows:
            summed.add(a, a if symmetric else b)
        return summed.take()

    as_rank(0, 1)
    whole = total()
    parts = []
    for rank in range(world):
        as_rank(rank, world)
        parts.append(total())
    assert torch.equal(sum(parts), whole)
    assert all(bool((part != 0).any()) for part in parts)
    assert sum((part != 0).int() for part in parts).max() == 1


def test_slabs_of_growing_length_are_dealt_fairly(as_rank):
    as_rank(0, 2)
    load = [0, 0]
    for slab in range(8):
        load[distributed.owner_of(slab)] += slab + 1
    assert load == [18, 18]
