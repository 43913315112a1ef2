"""What policies compute, and what the methods make of a block's inputs: oracles on small matrices."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gossamer.activation_sparsity.auto import Auto, Options, split
from gossamer.activation_sparsity.base import CoreGuide, CoreNeurons, GateThreshold, LinearPolicy, MLPParts, Policy
from gossamer.activation_sparsity.coreinfer import CoreInfer, clustered
from gossamer.activation_sparsity.cores import jaccard, nearest_cluster, refreshed, stable_core, top, vote
from gossamer.activation_sparsity.curve import Curve, equal_error, least_total
from gossamer.activation_sparsity.greedy import greedy
from gossamer.activation_sparsity.lowrank import with_residual
from gossamer.activation_sparsity.method import BlockData, Extent, Fitted, Site
from gossamer.activation_sparsity.quantiles import Quantiles, quantile
from gossamer.activation_sparsity.reference import active, sparse_linear
from gossamer.activation_sparsity.refine import balanced, grouped, refine
from gossamer.activation_sparsity.registry import METHODS, SUMMARIES, get_policy_method
from gossamer.activation_sparsity.rsparse import RSparse, evolve, rank_of
from gossamer.activation_sparsity.store import from_tensors, to_tensors
from gossamer.activation_sparsity.threshold import Threshold
from gossamer.activation_sparsity.wina import Wina
from gossamer.errors import CheckpointError, DataError, RecipeError

TOKENS, WIDTH, OUT = 300, 24, 40


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def site() -> Site:
    """Key and value are narrow, as under grouped queries; channels differ in scale and mean."""
    x = draw(TOKENS, WIDTH) * torch.linspace(0.1, 2, WIDTH) + torch.linspace(-0.5, 0.5, WIDTH)
    weights = {"q": draw(OUT, WIDTH, seed=1), "k": draw(10, WIDTH, seed=2) * torch.linspace(2, 0.1, WIDTH)}
    return Site(weights, x)


def extent(site: Site) -> Extent:
    return Extent(site.size, 0, 0, site.size)


def block(site: Site) -> BlockData:
    return BlockData(0, [site], {})


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


# ---- budgets ---------------------------------------------------------------------------------------------------------


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


# ---- core neurons ----------------------------------------------------------------------------------------------------

PARTS = MLPParts("mlp.gate", "mlp.up", "mlp.down", "silu", 6)


def core(keep: int = 2, clusters: Tensor | None = None) -> CoreNeurons:
    return CoreNeurons(PARTS, keep, torch.tensor([1.0, 1.0, 10.0, 1.0, 1.0, 1.0]), clusters)


def test_votes_take_both_signs_and_the_norm_of_the_column() -> None:
    inner = torch.tensor([[0.0, -9.0, 1.0, 2.0, 0.0, 0.0], [5.0, -9.0, 0.0, 2.0, 0.0, 0.0]])
    votes, importance = vote(inner, core().norms, 0.5)
    assert votes.tolist() == [0, 1, 1, 0, 0, 0]  # one of three that are not zero, each: 2 (1 x 10), then 1 (-9)
    assert float(importance.sum()) == pytest.approx(2.0)
    assert stable_core(inner, core(), 0.5).tolist() == [1, 2]
    assert top(torch.zeros(6), torch.zeros(6), 3).tolist() == [0, 1, 2]


def test_a_cluster_is_found_by_the_signature() -> None:
    clusters = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    guide = CoreGuide(1.0, "mlp", 2, torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]))
    assert nearest_cluster(torch.tensor([[9.0, 8, 0, 0, 0, 0]]), core(2, clusters), guide) == 0
    assert nearest_cluster(torch.tensor([[0.0, 0, 8, 9, 0, 0]]), core(2, clusters), guide) == 1


def test_a_core_is_taken_anew_only_after_drift() -> None:
    now = torch.tensor([0, 1], dtype=torch.int32)
    near, far = torch.tensor([[9.0, 8, 0, 0, 0, 0]]), torch.tensor([[0.0, 0, 0, 0, 8, 9]])
    guide = CoreGuide(1.0, refresh=4, drift=0.5)
    assert refreshed(now, near, core(), guide) is now
    assert refreshed(now, far, core(), guide).tolist() == [4, 5]
    assert jaccard(now, torch.tensor([1, 2], dtype=torch.int32)) == pytest.approx(1 / 3)


def test_clusters_hold_the_neurons_of_their_own_prompts() -> None:
    kinds = torch.arange(16) % 4
    prompts = [
        draw(9, 12, seed=k) * 0.01 + 5 * torch.nn.functional.one_hot(kind * 3, 12) for k, kind in enumerate(kinds)
    ]
    parts = replace(PARTS, neurons=12)
    data = BlockData(0, [], {"mlp": parts}, {}, {"mlp": prompts}, {"mlp": torch.ones(12)})
    method = CoreInfer(mode="similarity", keep=0.25, alpha=0.1)
    fitted = method.fit(data, {}, 0.0, Extent(100, 30, 70, 100))
    (found,), guide = method.conclude([fitted], lambda _: 0.0, lambda _: None)
    assert guide is not None
    assert guide.centroids is not None
    for kind in range(4):
        cluster = nearest_cluster(prompts[kind], found.mlps["mlp"], guide)
        assert kind * 3 in found.mlps["mlp"].clusters[cluster].tolist()
    with pytest.raises(DataError, match="1 prompts"):
        clustered(torch.ones(1, 5), 0)


# ---- stored and read -------------------------------------------------------------------------------------------------


def stored() -> Policy:
    shapes = {
        "q": (40, 24),
        "mlp.gate": (6, 24),
        "mlp.up": (6, 24),
        "mlp.down": (24, 6),
        "cats.fc": (12, 24),
        "d": (24, 6),
    }
    linear = LinearPolicy(
        torch.full((24,), math.inf), torch.zeros(24), torch.ones(40), torch.ones(40, 2), torch.ones(2, 24)
    )
    guide = CoreGuide(0.4, "mlp", 2, torch.eye(6)[:3], 8, 0.25)
    clusters = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
    cats = GateThreshold(MLPParts("cats.fc", "cats.fc", "d", "gelu_tanh", 6), torch.ones(6))
    return Policy(
        "auto", shapes, {"q": linear}, {"mlp": core(2, clusters), "cats": cats}, {"q": "q"}, guide, {"target": 0.5}
    )


def test_a_policy_comes_back_as_it_was() -> None:
    tensors, record = to_tensors(stored())
    again = from_tensors(tensors, json.loads(json.dumps(record)))
    more, same = to_tensors(again)
    assert same == record
    assert more.keys() == tensors.keys()
    assert all(torch.equal(more[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t, r: t.pop("q.threshold"), "q.threshold"),
        (lambda t, r: t.update({"q.shift": torch.zeros(3)}), "q.shift"),
        (lambda t, r: t.update({"q.center": torch.full((24,), math.nan)}), "not finite"),
        (lambda t, r: t.update({"q.threshold": torch.full((24,), math.nan)}), "not finite"),
        (lambda t, r: t.update({"more": torch.zeros(3)}), "more"),
        (lambda t, r: t["mlp.clusters"].fill_(99), "core neurons"),
        (lambda t, r: r.update(version=2), "version 2"),
        (lambda t, r: r["linears"].update(q=["center"]), "cannot consist"),
        (lambda t, r: r["mlps"]["mlp"].update(keep=7), "keeps 7"),
        (lambda t, r: r["mlps"]["mlp"]["parts"].update(activation="exec"), "exec"),
        (lambda t, r: r["mlps"]["mlp"]["parts"].update(neurons=5), "5 neurons"),
        (lambda t, r: r.pop("shapes"), "malformed"),
        (lambda t, r: r.update(linears=[1]), "malformed"),
        (lambda t, r: r["guide"].update(signature="elsewhere"), "elsewhere"),
        (lambda t, r: r["sites"].update(nothing="q"), "nothing"),
    ],
)
def test_a_damaged_policy_is_refused(damage, words: str) -> None:
    tensors, record = to_tensors(stored())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    record = json.loads(json.dumps(record))
    damage(tensors, record)
    with pytest.raises(CheckpointError, match=words):
        from_tensors(tensors, record)


def test_a_policy_of_another_model_is_refused() -> None:
    policy = stored()
    policy.check_model(policy.shapes)
    with pytest.raises(CheckpointError, match="another model"):
        policy.check_model({**policy.shapes, "q": (40, 25)})
    with pytest.raises(CheckpointError, match="no such matrix"):
        policy.check_model({"other": (1, 1)})


def test_the_registry() -> None:
    assert METHODS.keys() == SUMMARIES.keys()
    for name in METHODS:
        assert get_policy_method(name).name == name
    with pytest.raises(RecipeError, match="did you mean rsparse"):
        get_policy_method("r-sparse")
    assert Fitted().linears == {}
