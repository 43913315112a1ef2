"""The default method: exact counts, the order of errors among methods, dense targets, held-out choices, fallbacks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gossamer.pruning import base
from gossamer.pruning import gram as gram_module
from gossamer.pruning.admm import admm_mask
from gossamer.pruning.base import Holdout, LayerStats, relative_error
from gossamer.pruning.gossamer import QUICK, THOROUGH, Effort, Gossamer, Options
from gossamer.pruning.gram import Resolvent, unit_diagonal
from gossamer.pruning.heldout import choose_target, split_statistics
from gossamer.pruning.pattern import NM, Block, Pattern, Unstructured
from gossamer.pruning.sparsegpt import SparseGPT
from gossamer.pruning.wanda import Wanda


def case(
    rows: int, cols: int, tokens: int, *, drift: float = 0.0, noise: float = 0.0, seed: int = 0, windows: int = 4
) -> tuple[torch.Tensor, LayerStats, torch.Tensor, torch.Tensor]:
    """Correlated inputs; y = W x_dense with x = x_dense + drift * (a linear map of x_dense); noise is added to y.

    The held-out tokens are part of the Gram matrix. Also returns fresh x and y of the same kind.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / math.sqrt(cols) + 0.3 * torch.eye(cols)
    move = torch.randn(cols, cols, generator=generator) / math.sqrt(cols)
    weight = torch.randn(rows, cols, generator=generator)

    def sample(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        dense = torch.randn(count, cols, generator=generator) @ mixing
        x = dense + drift * dense @ move
        return x, dense @ weight.T + noise * torch.randn(count, rows, generator=generator)

    x, y = sample(tokens)
    length = tokens // windows
    held = (torch.arange(tokens) % length) >= length - max(1, length // 10)
    stats = LayerStats(tokens, x.norm(dim=0), x.T @ x, y.T @ x, Holdout(x[held], y[held]))
    return weight, stats, *sample(2000)


def output_error(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x @ weight.T - y).square().mean() / y.square().mean())


PATTERNS: list[Pattern] = [
    Unstructured(0.5, "row"),
    Unstructured(0.7, "matrix"),
    NM(2, 4),
    NM(4, 8),
    NM(1, 4),
    Block(2, 4, 0.5),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("effort", [THOROUGH, QUICK, None])
def test_below_sparsegpt_and_wanda(pattern: Pattern, effort: object) -> None:
    weight, stats, x, y = case(24, 40, 2000)
    new, keep = Gossamer(Options(effort=effort)).prune(weight, stats, pattern)  # type: ignore[arg-type]
    ours = relative_error(weight, new, stats)
    assert int((~keep).sum()) == pattern.zeros(24, 40)
    for rival in (SparseGPT(), Wanda()):
        other, _ = rival.prune(weight, stats, pattern)
        assert ours < relative_error(weight, other, stats)
        assert output_error(new, x, y) < output_error(other, x, y)


def test_row_scope_gives_equal_rows_and_matrix_scope_does_not() -> None:
    weight, stats, _, _ = case(10, 30, 1000)
    weight[:5] *= 20
    stats = LayerStats(stats.tokens, stats.norm, stats.gram)
    for scope, equal in (("row", True), ("matrix", False)):
        _, keep = Gossamer().prune(weight, stats, Unstructured(0.5, scope))
        counts = keep.sum(1)
        assert (int(counts.max() - counts.min()) <= 1) is equal
        assert int((~keep).sum()) == 150


def test_dense_targets_make_good_for_drifted_inputs() -> None:
    weight, stats, x, y = case(16, 32, 4000, drift=0.5)
    pattern = Unstructured(0.3, "matrix")
    aimed, _ = Gossamer().prune(weight, stats, pattern)
    plain, _ = Gossamer().prune(weight, LayerStats(stats.tokens, stats.norm, stats.gram), pattern)
    assert output_error(aimed, x, y) < 0.5 * output_error(plain, x, y)


def test_noise_with_few_tokens_is_not_learnt() -> None:
    """y is W x plus noise: the target has nothing to add, and 80 tokens on 64 inputs could be fitted by it."""
    for seed in range(3):
        weight, stats, x, y = case(16, 64, 80, noise=3.0, seed=seed)
        split = split_statistics(weight, stats, 256, print)
        assert split is not None
        assert stats.gram is not None
        level = float(stats.gram.diagonal().mean())
        goal, _ = choose_target(weight.clone(), stats, split, (0.01, 0.1, 1.0), level)
        greedy = torch.zeros_like(weight)
        Resolvent(stats.gram, 0.01 * level, 16).add_to(greedy, stats.target, 1.0)  # type: ignore[arg-type]
        excess, fitted = output_error(goal, x, y), output_error(greedy, x, y)
        floor = output_error(weight, x, y)
        assert excess - floor < 0.25 * (fitted - floor)


def test_held_out_tokens_outside_the_gram_are_noticed() -> None:
    weight, stats, _, _ = case(8, 16, 400)
    strange = Holdout(torch.full((9, 16), 50.0), torch.zeros(9, 8))
    far = LayerStats(stats.tokens, stats.norm, stats.gram, stats.target, strange)
    messages: list[str] = []
    new, _ = Gossamer().prune(weight, far, NM(2, 4), messages.append)
    plain, _ = Gossamer().prune(weight, LayerStats(stats.tokens, stats.norm, stats.gram), NM(2, 4))
    assert torch.equal(new, plain)
    assert len(messages) == 1


def test_deterministic_and_arguments_untouched() -> None:
    weight, stats, _, _ = case(12, 24, 600, drift=0.3)
    assert stats.gram is not None
    assert stats.target is not None
    before = weight.clone(), stats.gram.clone(), stats.target.clone()
    first = Gossamer().prune(weight, stats, Unstructured(0.6, "matrix"))
    second = Gossamer().prune(weight, stats, Unstructured(0.6, "matrix"))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip((weight, stats.gram, stats.target), before, strict=True))


@pytest.mark.parametrize("kind", ["rank one", "dead inputs", "all dead", "zero weight", "huge", "tiny"])
def test_degenerate_statistics(kind: str) -> None:
    weight, stats, _, _ = case(8, 16, 200)
    gram = stats.gram
    assert gram is not None
    if kind == "rank one":
        gram = torch.ones(16, 16)
    elif kind == "dead inputs":
        gram = gram.clone()
        gram[3:9] = 0
        gram[:, 3:9] = 0
    elif kind == "all dead":
        gram = torch.zeros(16, 16)
    elif kind == "zero weight":
        weight = torch.zeros(8, 16)
    else:
        gram = gram * (1e20 if kind == "huge" else 1e-20)
    for pattern in (*PATTERNS, Unstructured(1.0, "matrix")):
        new, keep = Gossamer().prune(weight, LayerStats(200, gram=gram), pattern)
        assert torch.isfinite(new).all()
        assert int((~keep).sum()) == pattern.zeros(8, 16)
        assert (new[~keep] == 0).all()


@pytest.mark.parametrize("effort", [THOROUGH, QUICK])
def test_the_excess_says_what_the_target_says(effort: Effort) -> None:
    weight, stats, _, _ = case(24, 32, 800, drift=0.5)
    assert stats.target is not None
    assert stats.gram is not None
    excess = (stats.target.double() - weight.double() @ stats.gram.double()).float()
    method = Gossamer(Options(effort=effort))
    _, mask, aim = method.prune_towards(weight, stats, Unstructured(0.5, "row"))
    other = replace(stats, target=None, excess=excess)
    _, found, again = method.prune_towards(weight, other, Unstructured(0.5, "row"))
    torch.testing.assert_close(again, aim, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(aim, weight, atol=0.05)
    assert float((found == mask).float().mean()) > 0.99


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_admm_beats_the_magnitude_mask(pattern: Pattern) -> None:
    weight, stats, _, _ = case(16, 32, 1000)
    assert stats.gram is not None
    scale, gram = unit_diagonal(stats.gram, 1.0)
    goal = weight * scale
    found, keep = admm_mask(goal, gram, pattern, (0.1, 0.6, 4.0), 6)
    simple = goal * pattern.mask(goal.abs())

    def loss(values: torch.Tensor) -> float:
        return float((((values - goal) @ gram) * (values - goal)).sum())

    assert int((~keep).sum()) == pattern.zeros(16, 32)
    assert loss(found) < loss(simple)
    with pytest.raises(ValueError, match="positive penalties"):
        admm_mask(goal, gram, pattern, (), 6)


@pytest.mark.parametrize("large", [True, False])
def test_resolvent(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the factor and by the inverse: the same; an indefinite matrix is shifted further."""
    monkeypatch.setattr(base, "LARGE", 0 if large else base.LARGE)
    monkeypatch.setattr(gram_module, "SLAB", 4)
    _, stats, _, _ = case(9, 16, 300)
    assert stats.gram is not None
    rows, start = torch.randn(9, 16), torch.randn(9, 16)
    out = start.clone()
    Resolvent(stats.gram, 0.5, 9).add_to(out, rows, 2.0)
    expected = start + 2 * torch.linalg.solve(stats.gram.double() + 0.5 * torch.eye(16), rows.double().T).T
    torch.testing.assert_close(out, expected.float(), rtol=1e-3, atol=1e-4)
    gram = torch.diag(torch.tensor([1.0, 1.0, -0.5]))
    out = torch.zeros(3, 3)
    Resolvent(gram, 0.1, 3).add_to(out, torch.eye(3), 1.0)
    torch.testing.assert_close(out, torch.diag(torch.tensor([0.5, 0.5, 2.0])))
    assert torch.equal(gram, torch.diag(torch.tensor([1.0, 1.0, -0.5])))
