"""Wanda against a reference written from the paper, and a case worked by hand."""

from __future__ import annotations

import pytest
import torch

from gossamer.pruning.base import LayerStats
from gossamer.pruning.pattern import parse_pattern
from gossamer.pruning.wanda import Wanda


def reference_mask(weight: torch.Tensor, gram: torch.Tensor, zeros_per_row: int) -> torch.Tensor:
    """|w_ij| sqrt(G_jj), the lowest of every row, in plain Python and float64."""
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for i, row in enumerate(weight.double().tolist()):
        score = [abs(w) * float(gram[j, j].double().sqrt()) for j, w in enumerate(row)]
        for j in sorted(range(len(row)), key=score.__getitem__)[:zeros_per_row]:
            keep[i, j] = False
    return keep


@pytest.mark.parametrize(("rows", "cols", "zeros"), [(6, 20, 10), (7, 16, 4), (5, 50, 35)])
def test_mask_equals_the_reference(rows: int, cols: int, zeros: int) -> None:
    x = torch.randn(3 * cols, cols) * torch.rand(cols)
    gram, weight = x.T @ x, torch.randn(rows, cols)
    stats = LayerStats(len(x), norm=gram.diagonal().sqrt())
    new, keep = Wanda().prune(weight, stats, parse_pattern(str(zeros / cols)))
    assert torch.equal(keep, reference_mask(weight, gram, zeros))
    assert torch.equal(new, weight * keep)


def test_two_of_four_equals_the_reference_group_by_group() -> None:
    x = torch.randn(60, 20) * torch.rand(20)
    gram, weight = x.T @ x, torch.randn(6, 20)
    _, keep = Wanda().prune(weight, LayerStats(60, norm=gram.diagonal().sqrt()), parse_pattern("2:4"))
    for start in range(0, 20, 4):
        part = slice(start, start + 4)
        assert torch.equal(keep[:, part], reference_mask(weight[:, part], gram[part, part], 2))


def test_a_loud_input_outweighs_a_large_weight() -> None:
    weight = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    new, _ = Wanda().prune(weight, LayerStats(1, norm=torch.tensor([1.0, 5.0])), parse_pattern("0.5"))
    assert new.tolist() == [[0, 1], [0, 1]]
