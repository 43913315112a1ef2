"""SparseGPT against the paper's algorithm written column by column with the inverse Hessian in float64."""

from __future__ import annotations

import pytest
import torch

from gossamer.pruning.base import LayerStats, relative_error
from gossamer.pruning.linalg import DAMPING_LADDER, upper_factor
from gossamer.pruning.pattern import Unstructured, parse_pattern
from gossamer.pruning.sparsegpt import SparseGPT


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    gone = torch.zeros(scores.numel(), dtype=torch.bool)
    gone[scores.flatten().argsort()[:count]] = True
    return gone.view(scores.shape)


def reference(weight: torch.Tensor, gram: torch.Tensor, text: str, damping: float = 0.01) -> tuple[torch.Tensor, ...]:
    """The paper's right-looking sweep: U = upper Cholesky of H^-1, blocks of 128 columns, exact cumulative counts."""
    w, h = weight.double().clone(), gram.double().clone()
    rows, cols = w.shape
    h += damping * h.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    gone = torch.zeros(w.shape, dtype=torch.bool)
    n, m = (int(part) for part in text.split(":")) if ":" in text else (0, 0)
    total = 0 if m else round(float(text) * rows * cols)
    for j in range(cols):
        if not m and j % 128 == 0:
            stop = min(j + 128, cols)
            count = round(total * stop / cols) - round(total * j / cols)
            gone[:, j:stop] = lowest((w[:, j:stop] / u.diagonal()[j:stop]) ** 2, count)
        if m and j % m == 0:
            score = (w[:, j : j + m] / u.diagonal()[j : j + m]) ** 2
            for i in range(rows):
                gone[i, j : j + m] = lowest(score[i], m - n)
        error = torch.where(gone[:, j], w[:, j], 0.0) / u[j, j]
        w[:, j:] -= error.outer(u[j, j:])
        w[gone[:, j], j] = 0
    return w, ~gone


def make_case(rows: int, cols: int, tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    mixing = torch.randn(cols, cols) / cols**0.5
    x = torch.randn(tokens or 4 * cols, cols) @ mixing
    return torch.randn(rows, cols), x.T @ x


@pytest.mark.parametrize(("rows", "cols"), [(6, 20), (7, 16), (12, 300), (5, 129)])
@pytest.mark.parametrize("text", ["0.3", "0.5", "0.7", "2:4", "1:4"])
def test_weight_and_mask_equal_the_reference(rows: int, cols: int, text: str) -> None:
    if ":" in text and cols % 4:
        pytest.skip("the group does not divide")
    weight, gram = make_case(rows, cols)
    new, keep = SparseGPT().prune(weight, LayerStats(1, gram=gram), parse_pattern(text, "matrix"))
    expected, expected_keep = reference(weight, gram, text)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(new, expected.float(), rtol=2e-3, atol=2e-4)


def test_two_inputs_by_hand() -> None:
    """x = (a, a): removing one weight moves all of it to the other, up to the damping."""
    gram = torch.ones(2, 2)
    weight = torch.tensor([[1.0, 3.0]])
    new, keep = SparseGPT().prune(weight, LayerStats(1, gram=gram), Unstructured(0.5, "matrix"))
    assert keep.tolist() == [[False, True]]
    # min over b of (1 + 3 - b)^2 + 0.01 ((1)^2 + (3 - b)^2), d/db = 0: b = 3 + 1 / 1.01
    assert new[0, 1].item() == pytest.approx(3 + 1 / 1.01, rel=1e-5)


def test_group_longer_than_a_strip_and_odd_group() -> None:
    weight, gram = make_case(4, 384)
    for text in ("50:192", "2:3"):
        _, keep = SparseGPT().prune(weight, LayerStats(1, gram=gram), parse_pattern(text))
        n, m = (int(part) for part in text.split(":"))
        assert (keep.view(4, -1, m).sum(-1) == n).all()


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize(("rows", "cols", "sparsity"), [(3, 301, 0.3), (7, 257, 0.97), (9, 140, 0.123)])
def test_counts_over_several_strips(scope: str, rows: int, cols: int, sparsity: float) -> None:
    weight, gram = make_case(rows, cols)
    _, keep = SparseGPT().prune(weight, LayerStats(1, gram=gram), Unstructured(sparsity, scope))
    assert int((~keep).sum()) == round(sparsity * rows * cols)
    counts = (~keep).sum(1)
    assert scope == "matrix" or int(counts.max() - counts.min()) <= 1


def test_error_falls_from_magnitude_to_sparsegpt_in_every_draw() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(400, 24) @ torch.randn(24, 96) + torch.randn(400, 96)  # few directions carry most
        weight, stats = torch.randn(16, 96), LayerStats(400, gram=x.T @ x)
        plain = weight * Unstructured(0.5, "matrix").mask(weight.abs())
        new, _ = SparseGPT().prune(weight, stats, Unstructured(0.5, "matrix"))
        assert relative_error(weight, new, stats) < relative_error(weight, plain, stats)


def test_singular_gram_needs_no_more_than_the_first_damping() -> None:
    messages: list[str] = []
    weight, gram = make_case(6, 40, tokens=3)
    new, keep = SparseGPT().prune(weight, LayerStats(3, gram=gram), Unstructured(0.5, "matrix"), log=messages.append)
    assert messages == []
    assert torch.isfinite(new).all()
    assert int((~keep).sum()) == 120


@pytest.mark.parametrize(("negative", "damping"), [(0.05, 0.1), (0.5, 1.0)])
def test_indefinite_gram_climbs_the_ladder(negative: float, damping: float) -> None:
    """One eigenvalue below zero by a known share of the mean diagonal: the first damping above it must be taken."""
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    values = torch.ones(12, dtype=torch.float64)
    values[0] = -negative * 11 / (12 + negative)  # share `negative` of the resulting mean
    gram = (basis * values @ basis.T).float()
    messages: list[str] = []
    factor = upper_factor(gram, messages.append)
    assert len(messages) == 1
    assert f"{damping:g}" in messages[0]
    expected = gram + damping * gram.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(factor, factor.triu())
    assert damping in DAMPING_LADDER


def test_hopeless_gram_falls_back_to_wanda_scores() -> None:
    gram = torch.full((8, 8), -5.0)
    gram.diagonal().copy_(torch.arange(1.0, 9.0))
    weight = torch.randn(6, 8)
    messages: list[str] = []
    new, keep = SparseGPT().prune(weight, LayerStats(1, gram=gram), Unstructured(0.5, "matrix"), log=messages.append)
    assert "diagonal" in messages[-1]
    assert torch.equal(keep, Unstructured(0.5, "matrix").mask(weight.abs() * gram.diagonal().sqrt()))
    assert torch.equal(new, weight * keep)


def test_dead_inputs_are_neither_zeroed_nor_moved() -> None:
    """Three dead inputs of eight, two zeros per row: dead weights go first (they cost nothing), the rest stay put."""
    x = torch.randn(40, 8)
    x[:, [1, 4, 6]] = 0
    weight = 1 + torch.rand(5, 8)
    new, keep = SparseGPT().prune(weight, LayerStats(40, gram=x.T @ x), Unstructured(0.25, "row"))
    assert keep[:, [0, 2, 3, 5, 7]].all()
    torch.testing.assert_close(new[keep], weight[keep], rtol=0, atol=0)
