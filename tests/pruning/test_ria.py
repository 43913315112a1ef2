"""RIA against its formula in plain Python."""

from __future__ import annotations

import pytest
import torch

from gossamer.pruning.base import LayerStats
from gossamer.pruning.pattern import Unstructured
from gossamer.pruning.ria import RIA


def reference_scores(weight: torch.Tensor, norm: torch.Tensor) -> list[list[float]]:
    size = weight.double().abs().tolist()
    rows, cols = len(size), len(size[0])
    row_sum = [sum(row) for row in size]
    col_sum = [sum(size[i][j] for i in range(rows)) for j in range(cols)]
    return [
        [(size[i][j] / col_sum[j] + size[i][j] / row_sum[i]) * float(norm[j]) ** 0.5 for j in range(cols)]
        for i in range(rows)
    ]


@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("shape", [(6, 20), (7, 16)])
def test_mask_equals_the_formula(scope: str, shape: tuple[int, int]) -> None:
    weight, norm = torch.randn(shape), torch.rand(shape[1]) * 9 + 0.1
    pattern = Unstructured(0.5, scope)
    new, keep = RIA().prune(weight, LayerStats(1, norm=norm), pattern)
    assert torch.equal(keep, pattern.mask(torch.tensor(reference_scores(weight, norm), dtype=torch.float64)))
    assert torch.equal(new, weight * keep)


def test_a_weak_row_keeps_its_share() -> None:
    """One row of eight is a hundred times smaller: magnitude empties it, relative importance does not."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(8, 1)
    weight[5] /= 100
    keep = RIA().prune(weight, LayerStats(1, norm=torch.ones(4)), Unstructured(0.5, "matrix"))[1]
    assert keep[5, 3]
    assert not Unstructured(0.5, "matrix").mask(weight.abs())[5].any()


def test_empty_row_and_column() -> None:
    weight = torch.randn(4, 6)
    weight[2] = 0
    weight[:, 3] = 0
    new, keep = RIA().prune(weight, LayerStats(1, norm=torch.ones(6)), Unstructured(0.5, "matrix"))
    assert torch.isfinite(new).all()
    assert int(keep.sum()) == 12
    assert not keep[2, :].all()
