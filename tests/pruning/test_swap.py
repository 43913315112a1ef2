"""One-swap refinement against brute force, on awkward shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gossamer.pruning.pattern import NM, Unstructured
from gossamer.pruning.support import solve_on_support
from gossamer.pruning.swap import refine, refine_slab


def problem(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / math.sqrt(cols) + torch.eye(cols)
    x = torch.randn(4 * cols, cols, generator=generator) @ mixing
    return torch.randn(rows, cols, generator=generator), x.T @ x / len(x)


def row_loss(values: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    error = (values - weight).double()
    return ((error @ gram.double()) * error).sum(1)


def best_swap(values: torch.Tensor, keep: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor, group: int) -> float:
    """The lowest loss of one row after one swap, the restored entry at its best value: everything tried, float64."""
    values, weight, gram = values.double(), weight.double(), gram.double()
    best = float(row_loss(values[None], weight[None], gram)[0])
    for i, j in itertools.product(keep.nonzero().flatten().tolist(), (~keep).nonzero().flatten().tolist()):
        if i // group != j // group:
            continue
        trial = values.clone()
        trial[i] = 0
        trial[j] = ((weight - trial) @ gram)[j] / gram[j, j]
        best = min(best, float(row_loss(trial[None], weight[None], gram)[0]))
    return best


@pytest.mark.parametrize("cols", [8, 12])
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("solved", [True, False])
def test_the_first_swap_is_the_best_of_all(cols: int, group: int | None, solved: bool) -> None:
    """With one candidate the greedy round is one swap; among all pairs of N:M groups it is the exact best."""
    weight, gram = problem(5, cols)
    pattern = NM(2, 4) if group else Unstructured(0.5)
    keep = pattern.mask(weight.abs())
    values = weight * keep
    if solved:
        values = solve_on_support(values, weight, gram, keep, 100)
    expected = [best_swap(values[r], keep[r], weight[r], gram, group or cols) for r in range(5)]
    before = row_loss(values, weight, gram)
    new, mask = values.clone(), keep.clone()
    refine(new, mask, weight, gram, group=group, candidates=cols)
    after = row_loss(new, weight, gram)
    for r in range(5):
        assert float(after[r]) <= expected[r] * (1 + 1e-4)  # the first swap is the best one, later ones only help
        assert float(after[r]) <= float(before[r]) * (1 + 1e-6)


def test_until_no_single_swap_helps() -> None:
    weight, gram = problem(6, 10, seed=3)
    keep = Unstructured(0.6).mask(weight.abs())
    values = solve_on_support(weight, weight, gram, keep, 100)
    for _ in range(50):
        if refine(values, keep, weight, gram, candidates=10) == 0:
            break
    else:
        pytest.fail("the search does not end")
    after = row_loss(values, weight, gram)
    for r in range(6):
        assert best_swap(values[r], keep[r], weight[r], gram, 10) >= float(after[r]) * (1 - 1e-4)


@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("candidates", [1, 3, 64])
def test_every_row_gains_and_counts_stay(group: int | None, candidates: int) -> None:
    weight, gram = problem(37, 24, seed=1)
    keep = (NM(group // 2, group) if group else Unstructured(0.7)).mask(weight.abs())
    values = weight * keep
    start, counts = keep.clone(), keep.sum(1)
    losses = row_loss(values, weight, gram)
    for _ in range(3):
        made = refine(values, keep, weight, gram, group=group, candidates=candidates, rows_at_once=10)
        now = row_loss(values, weight, gram)
        assert (now <= losses * (1 + 1e-5)).all()
        assert made <= 37 * candidates
        losses = now
    assert torch.equal(keep.sum(1), counts)
    assert not torch.equal(keep, start)
    assert (values[~keep] == 0).all()
    if group:
        assert (keep.view(37, -1, group).sum(-1) == group // 2).all()


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("candidates", [1, 6, 64])
def test_the_residual_follows_the_swaps(group: int | None, candidates: int) -> None:
    """The same swaps as with a residual made anew, and afterwards the residual of the new values."""
    weight, gram = problem(21, 24, seed=2)
    keep = (NM(1, group) if group else Unstructured(0.7)).mask(weight.abs())
    if group is None:
        keep[3], keep[4], keep[5] = True, False, False
        keep[5, 7] = True  # fewer entries than candidates: the same columns stand on both sides
    values = weight * keep
    expected, mask = values.clone(), keep.clone()
    count = refine(expected, mask, weight, gram, group=group, candidates=candidates)
    residual = (weight - values) @ gram
    assert refine_slab(values, keep, residual, gram, group=group, candidates=candidates) == count > 0
    assert torch.equal(keep, mask)
    assert torch.equal(values, expected)
    torch.testing.assert_close(residual, (weight - values) @ gram, rtol=1e-4, atol=1e-4)


def test_rows_without_freedom_are_left_alone() -> None:
    weight, gram = problem(3, 8)
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[1] = False
    values = weight * keep
    expected = values.clone()
    assert refine(values, keep, weight, gram) == 0
    assert torch.equal(values, expected)


def test_a_diagonal_gram_restores_the_largest() -> None:
    weight = torch.tensor([[1.0, -5.0, 2.0, 4.0]])
    keep = torch.tensor([[True, False, True, False]])
    values = weight * keep
    assert refine(values, keep, weight, torch.eye(4)) == 2
    assert torch.equal(values, torch.tensor([[0.0, -5.0, 0.0, 4.0]]))


def test_refuses_a_ragged_group() -> None:
    weight, gram = problem(2, 10)
    with pytest.raises(ValueError, match="multiple of the group 4"):
        refine(weight, weight != 0, weight, gram, group=4)
