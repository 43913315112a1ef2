"""The search for the highest sparsity within a limit of the perplexity."""

from __future__ import annotations

import math

import pytest

from gossamer.activation_sparsity.base import Policy
from gossamer.compress.activation.target import highest_sparsity
from gossamer.errors import RecipeError


def test_the_highest_sparsity_within_a_limit_is_bracketed() -> None:
    made: list[float] = []

    def make(sparsity: float) -> Policy:
        made.append(sparsity)
        return Policy("x", {}, facts={"s": sparsity})

    found = highest_sparsity(make, lambda p: (0.3 * p.facts["s"] ** 3, 0.0), 0.01, 0.9)
    assert 0.9 * 0.01 <= found.increase <= 0.01
    assert len(made) <= 6
    with pytest.raises(RecipeError, match=r"2\.0% already costs 5\.00%") as caught:
        highest_sparsity(make, lambda p: (0.05, 0.0), 0.01, 0.9)
    assert "5%" in str(caught.value)
    noisy = highest_sparsity(make, lambda p: (0.3 * p.facts["s"] ** 3, 0.004), 0.01, 0.9)
    assert 0.9 * 0.01 <= noisy.increase + 0.004 <= 0.01  # what is not certain does not count as within the limit
    with pytest.raises(RecipeError, match=r"already costs 0\.10% ± 1\.00%") as caught:
        highest_sparsity(make, lambda p: (0.001, 0.01), 0.01, 0.9)
    assert "1.1%" in str(caught.value)
    all_ = highest_sparsity(make, lambda p: (0.0001, 0.0), 0.01, 0.9)
    assert all_.sparsity == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("edge", [0.1, 0.17, 0.25])
def test_a_flat_stretch_does_not_mislead_the_search(edge: float) -> None:
    """Two tries that cost nearly the same say nothing of where the limit is: the other end of the bracket does."""
    made: list[float] = []

    def make(sparsity: float) -> Policy:
        made.append(sparsity)
        return Policy("x", {}, facts={"s": sparsity})

    def cost(policy: Policy) -> tuple[float, float]:
        s = policy.facts["s"]
        return 0.0069 * math.exp(0.1 * s + max(0.0, 30 * (s - edge))), 0.0

    found = highest_sparsity(make, cost, 0.01, 0.9)
    assert 0.009 <= found.increase <= 0.01, made
    assert len(made) <= 7, made
