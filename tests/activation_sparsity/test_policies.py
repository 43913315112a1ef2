"""What policies compute, and what the methods make of a block's inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sites import OUT, TOKENS, WIDTH, block, draw, extent

from gossamer.activation_sparsity.auto import Auto, Options, split
from gossamer.activation_sparsity.base import LinearPolicy
from gossamer.activation_sparsity.lowrank import with_residual
from gossamer.activation_sparsity.method import Site
from gossamer.activation_sparsity.quantiles import quantile
from gossamer.activation_sparsity.reference import active, sparse_linear
from gossamer.activation_sparsity.rsparse import RSparse, evolve, rank_of
from gossamer.activation_sparsity.threshold import Threshold
from gossamer.activation_sparsity.wina import Wina


@pytest.fixture
def site() -> Site:
    """Key and value are narrow, as under grouped queries; channels differ in scale and mean."""
    x = draw(TOKENS, WIDTH) * torch.linspace(0.1, 2, WIDTH) + torch.linspace(-0.5, 0.5, WIDTH)
    weights = {"q": draw(OUT, WIDTH, seed=1), "k": draw(10, WIDTH, seed=2) * torch.linspace(2, 0.1, WIDTH)}
    return Site(weights, x)


# ---- what an entry computes ------------------------------------------------------------------------------------------


def test_a_negative_threshold_is_the_dense_product_bit_for_bit(site: Site) -> None:
    weight, bias = site.weights["q"], draw(OUT, seed=3)
    entry = LinearPolicy(torch.full((WIDTH,), -1.0))
    dense = torch.nn.functional.linear(site.x, weight) + bias
    assert torch.equal(sparse_linear(site.x, weight, bias, entry), dense)


def test_nan_counts_and_an_infinite_threshold_drops_all_else() -> None:
    threshold = torch.tensor([math.inf, math.inf, 1.0, -1.0])
    x = torch.tensor([[math.nan, 5.0, 1.0, 0.0]])
    assert active(x, threshold).tolist() == [[True, False, False, True]]


def test_a_full_rank_residual_is_the_dense_product(site: Site) -> None:
    weight = site.weights["q"]
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    entry = LinearPolicy(torch.full((WIDTH,), 0.7), left=u.float(), right=(s[:, None] * vt).float())
    y = sparse_linear(site.x, weight, None, entry)
    assert not active(site.x, entry.threshold).all()
    assert torch.allclose(y, site.x @ weight.T, atol=1e-4)


def test_centre_shift_and_residual_against_a_sum_token_by_token(site: Site) -> None:
    weight, bias = site.weights["k"], draw(10, seed=4)
    entry = LinearPolicy(
        torch.rand(WIDTH), draw(WIDTH, seed=5) * 0.1, draw(10, seed=6), draw(10, 3, seed=7), draw(3, WIDTH, seed=8)
    )
    y = sparse_linear(site.x[:5], weight, bias, entry)
    for token in range(5):
        expected = bias.double() + entry.shift.double()
        rest = torch.zeros(WIDTH, dtype=torch.float64)
        for j in range(WIDTH):
            moved = float(site.x[token, j] - entry.center[j])
            if abs(moved) > float(entry.threshold[j]):
                expected = expected + weight[:, j].double() * moved
            else:
                rest[j] = moved
        expected = expected + entry.left.double() @ (entry.right.double() @ rest)
        assert torch.allclose(y[token].double(), expected, atol=1e-5)


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_thresholds_drop_the_share_asked_for(site: Site, share: float) -> None:
    for kind in (Threshold, Wina):
        fitted = kind(uniform=True).fit(block(site), {}, share, extent(site))
        for name, entry in fitted.linears.items():
            dropped = 1 - float(active(site.x, entry.threshold).float().mean())
            assert dropped == pytest.approx(share, abs=0.001), (kind, name)


def test_per_channel_thresholds_are_the_score(site: Site) -> None:
    fitted = Wina(uniform=True).fit(block(site), {}, 0.5, extent(site))
    for name, weight in site.weights.items():
        score = site.x.abs() * weight.norm(dim=0)
        kept = active(site.x, fitted.linears[name].threshold)
        assert float(score[kept].min()) >= float(score[~kept].max()) * (1 - 1e-6)


def test_rsparse_at_rho_one_is_thresholding(site: Site) -> None:
    ours = RSparse(rho=1.0, search=False).fit(block(site), {}, 0.5, extent(site)).linears
    plain = Threshold(uniform=True).fit(block(site), {}, 0.5, extent(site)).linears
    for name in ours:
        assert ours[name].rank == 0
        assert torch.equal(ours[name].threshold, plain[name].threshold)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.95])
def test_rsparse_stays_within_its_budget_for_every_shape(site: Site, rho: float) -> None:
    fitted = RSparse(rho=rho, search=False).fit(block(site), {}, 0.5, extent(site))
    for name, entry in fitted.linears.items():
        out = len(site.weights[name])
        channels = float(active(site.x, entry.threshold).float().mean()) * WIDTH
        least = out + WIDTH  # at least one channel or rank, whatever the budget
        assert channels * out + entry.rank * (out + WIDTH) <= 0.5 * out * WIDTH + least
        assert entry.rank == rank_of(out, WIDTH, 0.5, rho)


def test_the_rank_of_key_and_value_is_that_of_their_own_shape() -> None:
    assert rank_of(16, 64, 0.5, 0.0) == int((16 * 64 * 0.5 - 16) / 80)
    assert rank_of(64, 64, 0.5, 1.0) == 0


def test_the_evolution_is_seeded_and_finds_a_better_share() -> None:
    goal = [1.0, 0.2, 0.6]
    fitness = lambda genes: sum((a - b) ** 2 for a, b in zip(genes, goal, strict=True))
    once = evolve(3, 0.95, fitness, seed=1, generations=20)
    assert once == evolve(3, 0.95, fitness, seed=1, generations=20)
    assert once != evolve(3, 0.95, fitness, seed=2, generations=20)
    assert fitness(once) < min(fitness([0.95] * 3), fitness([1.0] * 3)) / 4


def test_centres_make_what_is_dropped_vanish_on_average(site: Site) -> None:
    threshold, center = split(site.x, torch.ones(WIDTH), 0.5, site.x.median(0).values, 3)
    moved = site.x - center
    dropped = torch.where(moved.abs() <= threshold, moved, 0.0)
    plain = torch.where(site.x.abs() <= quantile(site.x.abs(), 0.5), site.x, 0.0)
    assert float(dropped.mean(0).norm()) < 0.2 * float(plain.mean(0).norm())
    assert float((dropped == 0).float().mean()) == pytest.approx(0.5, abs=0.005)


def test_auto_misses_less_than_thresholds_and_scores(site: Site) -> None:
    """On tokens that it was not fitted on."""
    fit, new = replace(site, x=site.x[:200]), site.x[200:]
    errors = {}
    methods = {
        "auto": Auto(Options(gradient=False, residual=False)), "wina": Wina(uniform=True),
        "threshold": Threshold(uniform=True),
    }  # fmt: skip
    for name, method in methods.items():
        found = method.fit(block(fit), {"q": 0.5}, 0.5, extent(fit)).linears
        errors[name] = sum(
            float((sparse_linear(new, w, None, found[n]) - new @ w.T).square().sum()) for n, w in site.weights.items()
        )
    assert errors["auto"] < 0.95 * min(errors["wina"], errors["threshold"])


def test_auto_prefers_channels_whose_gradient_is_large() -> None:
    x = draw(TOKENS, WIDTH)
    gradient = draw(TOKENS, WIDTH, seed=1) * torch.where(torch.arange(WIDTH) < 4, 30.0, 1.0)
    site = Site({"q": torch.ones(OUT, WIDTH)}, x, gradient)
    entry = Auto(Options(residual=False)).fit(block(site), {"q": 0.5}, 0.5, extent(site)).linears["q"]
    assert float(entry.threshold[:4].max()) < float(entry.threshold[4:].min())


def test_a_residual_is_taken_where_what_is_dropped_has_low_rank() -> None:
    quiet = draw(TOKENS, 2) @ draw(2, 32, seed=1) * 0.3  # small inputs that all move together
    loud = draw(TOKENS, 8, seed=2) * 5
    x = torch.cat([loud, quiet], 1)
    weights = {"q": draw(64, 40, seed=3)}

    def make(share: float) -> dict[str, LinearPolicy]:
        return {"q": LinearPolicy(torch.full((40,), quantile(x.abs(), share)))}

    entries, rank = with_residual(x, weights, make, 0.7, make(0.7))
    assert 1 <= rank <= 4
    read = lambda found: float(active(x, found["q"].threshold).float().mean()) * 40 * 64 + found["q"].rank * 104
    assert read(entries) <= read(make(0.7)) * 1.01
    miss = lambda found: float((sparse_linear(x, weights["q"], None, found["q"]) - x @ weights["q"].T).square().sum())
    assert miss(entries) < 0.7 * miss(make(0.7))


def test_no_residual_where_dropped_inputs_are_noise(site: Site) -> None:
    x = draw(TOKENS, 64)
    weights = {"q": draw(64, 64, seed=1)}
    make = lambda share: {"q": LinearPolicy(torch.full((64,), quantile(x.abs(), share)))}
    assert with_residual(x, weights, make, 0.5, make(0.5))[1] == 0
