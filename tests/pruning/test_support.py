"""Conjugate gradient on a support against the dense normal equations."""

from __future__ import annotations

import pytest
import torch

from gossamer.pruning import support
from gossamer.pruning.support import Slab, solve_on_support


def problem(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5 * cols, cols, generator=generator)
    weight = torch.randn(rows, cols, generator=generator)
    return weight, x.T @ x / len(x), torch.rand(rows, cols, generator=generator) < 0.4


def exact(weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(weight, dtype=torch.float64)
    for row, mask in enumerate(keep):
        right = (weight[row].double() @ gram.double())[mask]
        result[row, mask] = torch.linalg.solve(gram.double()[mask][:, mask], right)
    return result


@pytest.mark.parametrize(("rows", "cols"), [(1, 3), (7, 33), (40, 16)])
def test_equals_the_normal_equations(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "SLAB", 6)  # several slabs, the last one short
    weight, gram, keep = problem(rows, cols)
    values = solve_on_support(weight, weight, gram, keep, 200)
    torch.testing.assert_close(values.double(), exact(weight, gram, keep), rtol=1e-3, atol=1e-4)
    assert (values[~keep] == 0).all()


def test_every_iteration_lowers_every_row() -> None:
    weight, gram, keep = problem(9, 24)
    previous = torch.full((9,), torch.inf)
    for iterations in range(6):
        error = solve_on_support(weight * keep, weight, gram, keep, iterations) - weight
        loss = ((error @ gram) * error).sum(1)
        assert (loss <= previous * (1 + 1e-5)).all()
        previous = loss


def test_the_gradient_follows_in_every_slab() -> None:
    weight, gram, keep = problem(11, 24)
    values = weight * keep
    slab = Slab(6, values)
    for first in (0, 6):
        rows = slice(first, first + 6)
        slab.begin(values[rows], weight[rows], gram, keep[rows])
        slab.descend(2)
        slab.descend(3)
        torch.testing.assert_close(slab.gradient, (weight[rows] - values[rows]) @ gram, rtol=1e-4, atol=1e-4)
    error, before = values - weight, weight * keep - weight
    assert (((error @ gram) * error).sum(1) < ((before @ gram) * before).sum(1)).all()
    assert (values[~keep] == 0).all()


def test_full_empty_and_solved_rows_stand_still() -> None:
    weight, gram, keep = problem(3, 8)
    keep[0], keep[1] = True, False
    values = solve_on_support(weight, weight, gram, keep, 50)
    torch.testing.assert_close(values[0], weight[0])
    assert (values[1] == 0).all()
    again = solve_on_support(values, weight, gram, keep, 50)
    torch.testing.assert_close(again, values, rtol=1e-3, atol=1e-4)


def test_a_singular_gram_gives_finite_values() -> None:
    weight, _, keep = problem(4, 8)
    values = solve_on_support(weight, weight, torch.zeros(8, 8), keep, 5)
    assert torch.equal(values, weight * keep)


def test_arguments_are_not_modified_and_checked() -> None:
    weight, gram, keep = problem(4, 8)
    copies = weight.clone(), gram.clone(), keep.clone()
    solve_on_support(weight, weight, gram, keep, 3)
    assert all(torch.equal(a, b) for a, b in zip((weight, gram, keep), copies, strict=True))
    with pytest.raises(ValueError, match="shapes do not agree"):
        solve_on_support(weight, weight, gram[:4], keep, 3)
