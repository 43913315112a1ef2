"""Allocations: totals, clamps, OWL's statistic, and the exact threshold over a whole model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gossamer.pruning.allocation import global_counts, outlier_share, owl, pooled_outlier_share, uniform
from gossamer.pruning.pattern import Unstructured


def weighted(values: list[float], sizes: list[int]) -> float:
    return math.fsum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


def test_outlier_share_by_hand() -> None:
    weight = torch.tensor([[1.0, -1.0], [1.0, -9.0]])
    norm = torch.tensor([1.0, 2.0])
    # Outputs 1, 2, 1, 18; mean 5.5; above 3 x mean: one of four.
    assert outlier_share(weight, norm, 3) == 25.0
    assert outlier_share(weight, norm, 4) == 0.0
    assert outlier_share(weight.to(torch.bfloat16), norm, 3) == 25.0


def test_pooled_share_uses_one_mean() -> None:
    quiet, loud = torch.ones(4, 4), torch.full((4, 4), 20.0)
    norm = torch.ones(4)
    assert outlier_share(loud, norm, 1.5) == 0.0
    assert pooled_outlier_share([(quiet, norm), (loud, norm)], 1.5) == 50.0


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.3, 0.5, 0.7, 0.9, 0.949, 0.97])
@pytest.mark.parametrize("lam", [0.02, 0.08, 0.3])
def test_owl_total_is_exact_under_any_clamp(sparsity: float, lam: float) -> None:
    shares = [3.0, 0.5, 0.7, 9.0, 0.1]
    sizes = [100, 2_000, 333, 4_096, 50]
    result = owl(shares, sizes, sparsity, lam)
    assert weighted(result, sizes) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= value <= max(0.95, sparsity) for value in result)
    order = sorted(range(5), key=shares.__getitem__, reverse=True)
    assert [result[i] for i in order] == sorted(result)


def test_owl_by_hand() -> None:
    # Equal blocks: keep ratios 0.3 +- 0.08 around the middle, so sparsities 0.78, 0.70, 0.62.
    assert owl([0.0, 1.0, 2.0], [10, 10, 10], 0.7, 0.08) == pytest.approx([0.78, 0.70, 0.62])


def test_owl_with_equal_shares_is_uniform() -> None:
    assert owl([2.0, 2.0], [5, 7], 0.6) == uniform([5, 7], 0.6) == [0.6, 0.6]


def test_owl_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 outlier shares for 3"):
        owl([1.0, 2.0], [1, 1, 1], 0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7, 0.97])
@pytest.mark.parametrize("kind", ["normal", "bfloat16", "ties", "tiny"])
def test_global_counts_equal_one_big_sort(sparsity: float, kind: str) -> None:
    matrices = [torch.randn(7, 16), torch.randn(6, 20) * 0.1, torch.randn(1, 3), torch.randn(40, 40) * 3]
    if kind == "bfloat16":
        matrices = [matrix.to(torch.bfloat16) for matrix in matrices]
    if kind == "ties":
        matrices = [matrix.round() for matrix in matrices]
    if kind == "tiny":
        matrices = [matrix * 1e-40 for matrix in matrices]
    values = torch.cat([matrix.flatten() for matrix in matrices]).float().abs()
    zeros = round(sparsity * values.numel())
    # Stable, so of equal values the first in order come first: prune from the far end of each tie.
    order = values.flip(0).argsort(stable=True)[:zeros]
    gone = torch.zeros(values.numel(), dtype=torch.bool)
    gone[values.numel() - 1 - order] = True
    edges = list(itertools.accumulate((matrix.numel() for matrix in matrices), initial=0))
    expected = [int(gone[a:b].sum()) for a, b in itertools.pairwise(edges)]

    counts = global_counts(lambda: iter(matrices), zeros)
    assert counts == expected
    masks = [
        Unstructured.for_count(n, *matrix.shape).mask(matrix.float().abs())
        for n, matrix in zip(counts, matrices, strict=True)
    ]
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), ~gone)


def test_global_counts_hold_one_matrix_at_a_time() -> None:
    alive: list[int] = []

    def stream() -> object:
        for seed in range(3):
            alive.append(seed)
            yield torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))

    assert sum(global_counts(stream, 24)) == 24
    assert alive == [0, 1, 2] * 3
