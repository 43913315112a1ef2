"""What every method in the registry promises, whatever it computes."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from gossamer.errors import ModelError, RecipeError
from gossamer.pruning import base
from gossamer.pruning.base import Holdout, LayerStats, relative_error
from gossamer.pruning.pattern import parse_pattern
from gossamer.pruning.registry import METHODS, SUMMARIES, get_method, summary

ALL_METHODS = sorted(METHODS)
CALIBRATED = [name for name in ALL_METHODS if name != "magnitude"]
PATTERNS = ["0.0", "0.3", "0.5", "0.97", "2:4", "1:4", "4:8", "block:2x4"]
SHAPES = [(6, 20), (7, 16), (8, 8), (4, 264)]
NEEDS = {"norm", "gram", "target", "excess", "holdout"}


def correlated(tokens: int, cols: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / math.sqrt(cols)
    scale = torch.rand(cols, generator=generator) + 0.2
    return torch.randn(tokens, cols, generator=generator) @ mixing * scale


def make_case(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, LayerStats]:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 1))
    x, held = correlated(3 * cols, cols, seed + 2), correlated(cols, cols, seed + 2)
    return weight, statistics(weight, x, held)


def statistics(weight: torch.Tensor, x: torch.Tensor, held: torch.Tensor) -> LayerStats:
    gram = x.T @ x
    full = weight.float()
    return LayerStats(len(x), x.norm(dim=0), gram, full @ gram, Holdout(held, held @ full.T))


def fits(text: str, rows: int, cols: int) -> bool:
    try:
        parse_pattern(text).check(rows, cols, "test")
    except RecipeError:
        return False
    return True


CASES = [(text, shape) for text in PATTERNS for shape in SHAPES if fits(text, *shape)]


def assert_valid(weight: torch.Tensor, new: torch.Tensor, keep: torch.Tensor, zeros: int) -> None:
    assert new.shape == keep.shape == weight.shape
    assert new.dtype == torch.float32
    assert keep.dtype == torch.bool
    assert int((~keep).sum()) == zeros
    assert torch.isfinite(new).all()
    assert (new[~keep] == 0).all()
    assert not torch.signbit(new[~keep]).any()


@pytest.mark.parametrize("name", ALL_METHODS)
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_exact_counts_and_structure(name: str, text: str, shape: tuple[int, int]) -> None:
    method = get_method(name)
    weight, stats = make_case(*shape)
    for scope in ("row", "matrix"):
        pattern = parse_pattern(text, scope)
        new, keep = method.prune(weight, stats, pattern)
        assert_valid(weight, new, keep, pattern.zeros(*shape))
        if text[1:2] == ":":
            group = int(text[2:])
            assert (keep.view(shape[0], -1, group).sum(-1) == int(text[0])).all()
        elif text.startswith("block"):
            blocks = keep.view(shape[0] // 2, 2, shape[1] // 4, 4)
            assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
        elif scope == "row":
            counts = (~keep).sum(1)
            assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("name", ALL_METHODS)
@pytest.mark.parametrize("text", PATTERNS)
def test_all_scores_equal(name: str, text: str) -> None:
    method = get_method(name)
    weight = torch.ones(8, 16)
    x = torch.eye(16) * 2
    pattern = parse_pattern(text, method.scope)
    new, keep = method.prune(weight, statistics(weight, x, x), pattern)
    assert_valid(weight, new, keep, pattern.zeros(8, 16))


@pytest.mark.parametrize("name", ALL_METHODS)
@pytest.mark.parametrize("text", ["0.0", "4:4", "block:2x4:0"])
def test_no_zeros_leaves_every_bit(name: str, text: str) -> None:
    weight, stats = make_case(6, 20)
    weight[0, 0] = -0.0
    new, keep = get_method(name).prune(weight, stats, parse_pattern(text))
    assert torch.equal(new.view(torch.int32), weight.view(torch.int32))
    assert new.data_ptr() != weight.data_ptr()
    assert keep.all()


@pytest.mark.parametrize("name", ALL_METHODS)
@pytest.mark.parametrize("text", ["0.5", "2:4", "block:2x4"])
def test_inputs_untouched_and_result_repeatable(name: str, text: str) -> None:
    method = get_method(name)
    weight, stats = make_case(6, 20)
    copies = [weight.clone(), stats.norm.clone(), stats.gram.clone(), stats.target.clone()]
    held = [stats.holdout.x.clone(), stats.holdout.y.clone()]
    pattern = parse_pattern(text, method.scope)
    first, first_keep = method.prune(weight, stats, pattern)
    for copy, now in zip(copies, [weight, stats.norm, stats.gram, stats.target], strict=True):
        assert torch.equal(copy, now)
    assert torch.equal(held[0], stats.holdout.x)
    assert torch.equal(held[1], stats.holdout.y)
    second, second_keep = get_method(name).prune(weight, stats, pattern)
    assert torch.equal(first, second)
    assert torch.equal(first_keep, second_keep)


@pytest.mark.parametrize("name", ALL_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weight_equals_its_float32_copy(name: str, dtype: torch.dtype) -> None:
    weight, _ = make_case(7, 16)
    weight = weight.to(dtype)
    x = correlated(48, 16, 5)
    stats = statistics(weight, x, x[:9])
    half, half_keep = get_method(name).prune(weight, stats, parse_pattern("2:4"))
    full, full_keep = get_method(name).prune(weight.float(), stats, parse_pattern("2:4"))
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
    assert torch.equal(half_keep, full_keep)


@pytest.mark.parametrize("name", ALL_METHODS)
def test_weights_that_are_not_finite(name: str) -> None:
    weight, stats = make_case(6, 20)
    weight[3, 4] = math.nan
    with pytest.raises(ModelError, match="1 NaN or infinite"):
        get_method(name).prune(weight, stats, parse_pattern("0.5"))


@pytest.mark.parametrize("name", CALIBRATED)
def test_statistics_that_are_not_finite_or_missing(name: str) -> None:
    method = get_method(name)
    weight, stats = make_case(6, 20)
    broken = {field.name: getattr(stats, field.name) for field in fields(stats)}
    broken["norm"], broken["gram"] = stats.norm.clone(), stats.gram.clone()
    broken["norm"][2] = broken["gram"][2, 2] = math.inf
    with pytest.raises(ModelError, match="statistic"):
        method.prune(weight, LayerStats(**broken), parse_pattern("0.5"))
    with pytest.raises(ValueError, match="not measured"):
        method.prune(weight, LayerStats(tokens=60), parse_pattern("0.5"))


@pytest.mark.parametrize("name", ALL_METHODS)
def test_pattern_that_does_not_fit(name: str) -> None:
    weight, stats = make_case(6, 20)
    with pytest.raises(RecipeError, match="4:8"):
        get_method(name).prune(weight, stats, parse_pattern("4:8"))


@pytest.mark.parametrize("name", ALL_METHODS)
@pytest.mark.parametrize("dead", [[3], [0, 5, 19], list(range(20))])
def test_inputs_that_never_fire(name: str, dead: list[int]) -> None:
    weight, _ = make_case(6, 20)
    x = correlated(60, 20, 7)
    x[:, dead] = 0
    messages: list[str] = []
    method = get_method(name)
    pattern = parse_pattern("0.5", method.scope)
    new, keep = method.prune(weight, statistics(weight, x, x[:12]), pattern, log=messages.append)
    assert_valid(weight, new, keep, 60)
    assert torch.equal(new[:, dead][keep[:, dead]], weight[:, dead][keep[:, dead]])


@pytest.mark.parametrize("name", ALL_METHODS)
def test_fewer_tokens_than_inputs(name: str) -> None:
    weight, _ = make_case(8, 40)
    x = correlated(5, 40, 3)
    new, keep = get_method(name).prune(weight, statistics(weight, x[:4], x[4:]), parse_pattern("0.5"))
    assert_valid(weight, new, keep, 160)


@pytest.mark.parametrize("name", ALL_METHODS)
def test_declarations(name: str) -> None:
    method = get_method(name)
    assert method.name == name
    assert method.needs <= NEEDS
    assert method.order in {"block", "input"}
    assert method.scope in {"row", "matrix"}
    assert 20 < len(summary(name)) < 110
    assert SUMMARIES.keys() == METHODS.keys()


@pytest.mark.parametrize("name", ["sparsegpt", "gossamer"])
@pytest.mark.parametrize("text", ["0.3", "0.5", "0.7", "2:4", "block:2x4"])
def test_solvers_beat_magnitude_on_correlated_inputs(name: str, text: str) -> None:
    weight, stats = make_case(24, 64)
    errors = {}
    for candidate in (name, "magnitude"):
        method = get_method(candidate)
        new, _ = method.prune(weight, stats, parse_pattern(text, method.scope))
        errors[candidate] = relative_error(weight, new, stats)
    assert errors[name] < errors["magnitude"]


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="magnitude.*sparsegpt.*wanda") as caught:
        get_method("sparse-gpt")
    assert caught.value.hint == "did you mean sparsegpt?"


@pytest.mark.parametrize("panel", [1, 7, 32, 50])
def test_relative_error_by_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PANEL", panel)
    weight, stats = make_case(24, 32)
    pruned = weight * (torch.rand(24, 32, generator=torch.Generator().manual_seed(2)) < 0.5)
    assert stats.gram is not None
    gram, change, whole = stats.gram.double(), (weight - pruned).double(), weight.double()
    expected = float((change @ gram * change).sum() / (whole @ gram * whole).sum())
    assert relative_error(weight, pruned, stats) == pytest.approx(expected, rel=1e-5)


def test_relative_error_by_hand() -> None:
    weight, pruned = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]])
    gram = x.T @ x  # [[6, 0], [0, 2]]
    assert relative_error(weight, pruned, LayerStats(3, gram=gram)) == pytest.approx(8 / 14)
    assert relative_error(weight, pruned, LayerStats(3, norm=x.norm(dim=0))) == pytest.approx(8 / 14)
    assert relative_error(weight, pruned, LayerStats(0)) == pytest.approx(4 / 5)
    assert relative_error(weight, weight, LayerStats(3, gram=torch.zeros(2, 2))) == 0.0
