"""Rivals: exact densities, published files read and refused, and the cost model against its own sums."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gossamer.attention.cost import budgeted_keys, decode_cost
from gossamer.attention.plan import FULL, HeadPlan, HeadRule
from gossamer.attention.rivals import duo, masformer, read_duo, read_moa, uniform
from gossamer.attention.solver import Problem
from gossamer.errors import DataError, ModelError, RecipeError

LENGTHS = (64, 128, 256)


def plan_of(rules, query_heads=4):
    return HeadPlan("x", query_heads, 8, 16, LENGTHS, None, rules)


def test_uniform_has_its_density_at_every_length():
    plan = plan_of(uniform(3, 2, 0.5, 4))
    assert [plan.density(n) for n in LENGTHS] == [0.5, 0.5, 0.5]
    assert {rule.sink for layer in plan.heads for rule in layer} == {4}


def test_masformer_takes_the_layers_that_lose_most():
    rules = [FULL, HeadRule(0, 32, 0.0), HeadRule(0, 16, 0.0)]
    importance = np.array([1.0, 9.0, 2.0, 8.0])
    losses = importance[None, :, None] * np.array([0.0, 1.0, 1.2])
    costs = np.array([[rule.kept(256, 16) for rule in rules]], dtype=float)[:, None] * np.ones((1, 4, 1)) * 2
    chosen = masformer(Problem(losses, costs, np.array([0.56 * 256 * 8])), rules, 2)
    local = rules[2]
    assert [layer[0] for layer in chosen] in ([local, FULL, local, FULL], [rules[1], FULL, rules[1], FULL])
    assert all(len(set(layer)) == 1 for layer in chosen)
    assert len({layer[0] for layer in chosen if layer[0] != FULL}) == 1
    with pytest.raises(RecipeError, match="larger density"):
        masformer(Problem(losses, costs, np.array([1.0])), rules, 2)
    tried = masformer(Problem(losses, costs, np.array([0.56 * 256 * 8])), rules, 2, time_limit=0.0)
    spent = sum(rule.kept(256, 16) for layer in tried for rule in layer)
    assert spent <= 0.56 * 256 * 8  # the first local rule that fits, without a search


def test_duo_keeps_the_highest_scores_within_the_tightest_length():
    scores = np.arange(6, dtype=float).reshape(2, 3)
    streaming = HeadRule(4, 20, 0.0)
    rules = duo(scores, 0.6, LENGTHS, 16, streaming)
    full = [rule == FULL for layer in rules for rule in layer]
    assert full == [False] * 3 + [True] * 3 or full == [False] * 4 + [True] * 2
    plan = plan_of(rules, query_heads=6)
    assert all(plan.density(n) <= 0.6 for n in LENGTHS)
    more = [*map(list, rules)]
    first = full.index(True) - 1
    more[first // 3][first % 3] = FULL
    assert plan_of(tuple(map(tuple, more)), query_heads=6).density(64) > 0.6
    with pytest.raises(RecipeError, match="streaming heads keep 0.312"):
        duo(scores, 0.25, LENGTHS, 16, streaming)


def test_duo_files(tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\t0.9\n1.0\t0.0\n")
    gates, windows = read_duo(tmp_path, 2, 2)
    assert gates.tolist() == [[0.1, 0.9], [1.0, 0.0]]
    assert windows == (64, 256)
    (tmp_path / "config.json").write_text('{"sink_size": 128, "recent_size": 512}')
    assert read_duo(tmp_path / "full_attention_heads.tsv", 2, 2)[1] == (128, 512)
    with pytest.raises(ModelError, match="2 x 2 layers and KV heads, the model has 2 x 4"):
        read_duo(tmp_path, 2, 4)
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\tx\n")
    with pytest.raises(DataError, match="no DuoAttention pattern"):
        read_duo(tmp_path, 2, 2)
    with pytest.raises(DataError):
        read_duo(tmp_path / "absent", 2, 2)


def test_moa_files_are_collapsed_to_what_every_query_head_needs(tmp_path):
    draw = np.random.default_rng(0)
    alphas = draw.integers(-32, 64, (3, 8)).astype(float)
    betas = draw.integers(0, 7, (3, 8)) / 8
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"alphas": alphas.tolist(), "betas": betas.tolist()}))
    rules = read_moa(path, 3, 8, 2, LENGTHS, 4)
    for length in range(LENGTHS[0], LENGTHS[-1] + 1):
        spans = np.minimum(alphas + betas * length, length).reshape(3, 2, 4).max(2)
        for i in range(3):
            for h in range(2):
                assert rules[i][h].kept(length, 16) >= np.floor(spans[i, h])
    alphas[:], betas[:] = -16, 0.625
    path.write_text(json.dumps({"alphas": alphas.tolist(), "betas": betas.tolist()}))
    assert set(read_moa(path, 3, 8, 2, LENGTHS, 4)[0]) == {HeadRule(4, -16, 0.625)}
    with pytest.raises(ModelError, match="3 x 8 layers and query heads, the model has 4 x 8"):
        read_moa(path, 4, 8, 2, LENGTHS, 4)
    path.write_text('{"alphas": [[1]]}')
    with pytest.raises(DataError, match="no MoA plan"):
        read_moa(path, 1, 1, 1, LENGTHS, 4)


def test_cost_is_the_sum_over_tokens():
    rules = ((HeadRule(4, 40, 0.0), HeadRule(0, 0, 0.5)), (FULL, HeadRule(1, -8, 0.25)))
    plan = HeadPlan("x", 6, 8, 16, LENGTHS, None, rules)
    shape = {"layers": 2, "query_heads": 6, "kv_heads": 2, "head_dim": 8, "parameters": 1000}
    keys = sum(plan.tokens(30 + t) for t in range(1, 51))
    cost = decode_cost(plan, **shape, prompt=30, tokens=50)
    assert cost.attention_flops == 4 * keys * 3 * 8
    assert cost.kv_bytes_read == 4 * keys * 8
    assert cost.flops == 2 * 1000 * 50 + cost.attention_flops
    assert cost.eflops == cost.flops + 562.5 * cost.kv_bytes_read
    dense = decode_cost(None, **shape, prompt=30, tokens=50)
    assert dense.kv_bytes_read == 4 * 4 * sum(30 + t for t in range(1, 51)) * 8


@pytest.mark.parametrize(("prompt", "tokens", "budget"), [(100, 400, 50), (100, 400, 300), (100, 50, 300)])
def test_the_closed_form_has_the_right_sign(prompt, tokens, budget):
    counted = int(torch.arange(prompt + 1, prompt + tokens + 1).clamp(max=budget).sum())
    assert budgeted_keys(prompt, tokens, budget) == pytest.approx(counted, abs=tokens)
    if tokens >= budget - prompt:
        published = budget * tokens - 0.5 * max(0, budget - prompt) ** 2
        assert budgeted_keys(prompt, tokens, budget) == published
