"""How much every matrix skips: curves, greedy, refinement, quantiles."""

from __future__ import annotations

import pytest
from sites import draw

from gossamer.activation_sparsity.curve import Curve, equal_error, least_total
from gossamer.activation_sparsity.greedy import greedy
from gossamer.activation_sparsity.quantiles import Quantiles, quantile
from gossamer.activation_sparsity.refine import balanced, grouped, refine


def curves() -> dict[str, Curve]:
    grid = [k / 20 for k in range(21)]
    return {
        "small": Curve(grid, [0.5 * s**2 for s in grid], 100),
        "large": Curve(grid, [4.0 * s**2 for s in grid], 300),
    }


def skipped(shares: dict[str, float]) -> float:
    return sum(curves()[name].size * share for name, share in shares.items())


def test_equal_error_is_equal_and_meets_the_number_of_weights() -> None:
    shares, error = equal_error(curves(), 200)
    assert skipped(shares) == pytest.approx(200, abs=0.1)
    assert all(curve.error(shares[name]) == pytest.approx(error, rel=1e-6) for name, curve in curves().items())


def test_the_least_sum_of_errors_beats_a_search_by_hand() -> None:
    shares = least_total(curves(), 200)
    assert skipped(shares) == pytest.approx(200)
    cost = lambda s: sum(curve.error(s[name]) for name, curve in curves().items())
    by_hand = min(cost({"small": k / 100, "large": (200 - k) / 300}) for k in range(101))
    assert cost(shares) <= by_hand + 1e-9


def test_greedy_meets_the_target_and_spares_the_sensitive_matrix() -> None:
    sizes = {"a": 100, "b": 400}
    shares = greedy(sizes, 0.5, lambda s: 50 * s["a"] ** 2 + s["b"] ** 2)
    assert sum(sizes[name] * share for name, share in shares.items()) == pytest.approx(250)
    assert shares["a"] < shares["b"]
    full = greedy(sizes, 0.999, lambda s: sum(s.values()))
    assert max(full.values()) <= 0.97 + 1e-9


def test_refinement_lowers_the_loss_at_the_same_number_of_weights() -> None:
    sizes = {"a": 100, "b": 100, "c": 200}
    loss = lambda s, base=False: 9 * s["a"] ** 2 + s["b"] ** 2 + 2 * s["c"] ** 2
    start = dict.fromkeys(sizes, 0.5)
    shares = refine(start, sizes, [["a"], ["b"], ["c"]], loss, rounds=5)
    assert loss(shares) < 0.85 * loss(start)
    assert sum(sizes[n] * s for n, s in shares.items()) == pytest.approx(200, rel=1e-6)
    floored = balanced({"a": 0.1, "b": 0.1, "c": 0.1}, sizes, 200, {"c": 0.8})
    assert floored["c"] == pytest.approx(0.8)
    assert floored["a"] == pytest.approx(0.2)


def test_groups_hold_neighbours_of_one_kind() -> None:
    names = [f"layers.{i}.{kind}" for i in range(6) for kind in ("q", "up")]
    groups = grouped(names, 4)
    assert len(groups) == 4
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert groups[0] == ["layers.0.q", "layers.1.q", "layers.2.q"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_quantiles_are_exact_on_their_grid(share: float) -> None:
    scores = draw(1000, 7).abs()
    dropped = float((scores <= Quantiles(scores).at(share)).float().mean())
    assert dropped == pytest.approx(share, abs=2e-4)
    assert float((scores <= quantile(scores, share)).float().mean()) == pytest.approx(share, abs=2e-4)
