"""The largest of many numbers, against sorting all of them."""

from __future__ import annotations

import pytest
import torch

from gossamer.finetune.spiel.positions import merged
from gossamer.finetune.spiel.top import TopPool, best, highest

NAN, INF = float("nan"), float("inf")


def largest(values, capacity):
    """(positions, values) of the largest magnitudes but zeros, ascending; of equal ones the lower position."""
    order = sorted((i for i in range(len(values)) if values[i] != 0), key=lambda i: (-abs(values[i]), i))[:capacity]
    return sorted(order)


@pytest.mark.parametrize("pieces", [[40_000], [4097, 30_000, 5903], [8, 1, 7, 39_984]])
@pytest.mark.parametrize("capacity", [1, 40, 3000, 40_000])
@pytest.mark.parametrize("kind", ["normal", "few levels", "one hot column", "mostly zero", "ascending"])
def test_a_pool_keeps_the_largest(kind, capacity, pieces):
    torch.manual_seed(capacity)
    values = torch.randn(40_000)
    if kind == "few levels":
        values = values.round()
    elif kind == "one hot column":
        values.view(-1, 64)[:, 61] *= 100
    elif kind == "mostly zero":
        values[torch.rand(40_000) < 0.999] = 0.0
    elif kind == "ascending":
        values = values.sort().values
    pool, first = TopPool(capacity, torch.device("cpu")), 0
    for piece in values.split(pieces):
        pool.offer(first, piece.view(1, -1))
        first += len(piece)
    want = largest(values.tolist(), capacity)
    if kind == "few levels" and len(pieces) > 1 and capacity < 40_000:  # pieces are cut to size one by one
        assert sorted(pool.value.abs().tolist()) == sorted(values[want].abs().tolist())
        return
    order = pool.position.argsort()
    assert pool.position[order].tolist() == want
    assert torch.equal(pool.value[order], values[want])


def test_a_pool_passes_by_what_does_not_exceed_the_floor():
    pool = TopPool(100, torch.device("cpu"))
    pool.offer(10, torch.tensor([[0.5, -2.0, 1.0, NAN, 3.0, 0.0, 0.1, 0.2, -1.5]]), 1.0)
    assert pool.position.tolist() == [11, 14, 18]


@pytest.mark.parametrize("count", [0, 1, 3, 5, 6, 9])
def test_best_breaks_ties_by_position_and_puts_nan_first(count):
    position = torch.tensor([50, 10, 40, 20, 30, 60])
    score = torch.tensor([2.0, 1.0, 2.0, 2.0, NAN, INF])
    order = [4, 5, 3, 2, 0, 1]  # nan and inf are equal: position 30 is before 60
    want = sorted(order[:count], key=lambda i: position[i])
    assert best(position, score, count).tolist() == want
    ascending = position.argsort()
    assert position[ascending][highest(score[ascending], count)].tolist() == sorted(position[want].tolist())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_two_ascending_lists_become_one(size, share):
    generator = torch.Generator().manual_seed(size)
    every = torch.randperm(3 * size, generator=generator)[:size].sort().values
    more = torch.rand(size, generator=generator) < share
    both = torch.cat([every[~more], every[more]])
    assert torch.equal(both[merged(every[~more], every[more])], every)
