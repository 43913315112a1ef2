"""Influence: against the loss itself where that is linear, and tile by tile against the N x N matrices."""

from __future__ import annotations

import pytest
import torch

from gossamer.attention.influence import influence, row_effects
from gossamer.attention.plan import FULL, HeadPlan, HeadRule

RULES = [HeadRule(0, 8, 0.0), HeadRule(3, 2, 0.5), HeadRule(1, -10, 0.75), HeadRule(70, 0, 0.25), FULL]
BLOCK, KV, GROUP, WIDTH = 4, 2, 3, 8


def case(length: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(length)
    draw = lambda heads: torch.randn(heads, length, WIDTH, generator=generator).to(dtype)
    return draw(KV * GROUP) * 2, draw(KV), draw(KV), draw(KV * GROUP)


def visible(rule: HeadRule, length: int) -> torch.Tensor:
    plan = HeadPlan("x", GROUP, WIDTH, BLOCK, (length,), None, ((rule,),))
    return plan.visible(0, torch.arange(length), torch.arange(length))[0]


def attention(q, k, v, mask):
    """O of every query head with one mask, in float64."""
    k, v = (x.double().repeat_interleave(GROUP, 0) for x in (k, v))
    logits = (q.double() @ k.transpose(1, 2)) * WIDTH**-0.5
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("length", [1, 63, 64, 133])
def test_group_exact_is_the_true_difference_of_a_linear_loss(length):
    q, k, v, g = case(length)
    causal = torch.ones(length, length).tril().bool()
    dense = attention(q, k, v, causal)
    effects = row_effects(q, k, v, g, RULES, BLOCK)
    assert effects.shape == (KV, length, len(RULES))
    for r, rule in enumerate(RULES):
        sparse = attention(q, k, v, visible(rule, length))
        true = ((sparse - dense) * g.double()).sum(-1).view(KV, GROUP, length).sum(1)
        # Where nearly all of a row is removed, float32 probabilities have few digits left of what stays.
        torch.testing.assert_close(effects[..., r], true, atol=2e-5, rtol=1e-3)
    assert not effects[..., -1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_equal_the_whole_matrices(dtype):
    length = 150
    q, k, v, g = case(length, dtype)
    causal = torch.ones(length, length).tril().bool()
    found = influence(q, k, v, g, RULES, BLOCK)
    wide_k, wide_v = (x.double().repeat_interleave(GROUP, 0) for x in (k, v))
    a = ((q.double() @ wide_k.transpose(1, 2)) * WIDTH**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    gr = g.double() @ wide_v.transpose(1, 2)
    s = (a * gr).sum(-1, keepdim=True)
    e = -a * (gr - s) / (1 - a).clamp_min(1e-6)
    for r, rule in enumerate(RULES):
        gone = causal & ~visible(rule, length)
        mass = (a * gone).sum(-1)
        row = ((a * (s - gr) * gone).sum(-1) / (1 - mass)).view(KV, GROUP, length).sum(1)
        for name, expected in [
            ("group", row.abs().sum(1)),
            ("fisher", row.square().sum(1)),
            ("moa", (e.abs() * gone).sum((1, 2)).view(KV, GROUP).sum(1)),
            ("mass", mass.view(KV, -1).sum(1)),
        ]:
            torch.testing.assert_close(getattr(found, name)[:, r], expected, atol=1e-4, rtol=1e-4, msg=name)
    assert found.rows == length * GROUP
    assert found.group.dtype == torch.float64


def test_the_models_own_window_counts():
    """A key that the model does not see anyway costs nothing."""
    length, reach = 100, 8
    q, k, v, g = case(length)
    own = lambda first, last: torch.arange(length) > torch.arange(first, last)[:, None] - reach
    found = influence(q, k, v, g, RULES, BLOCK, seen=own)
    assert not found.moa[:, 0].any()
    assert found.moa[:, 1].any()  # its window of 4 tokens beside the sinks is shorter


def test_sums_of_two_sequences():
    q, k, v, g = case(40)
    once = influence(q, k, v, g, RULES, BLOCK)
    twice = once.plus(once)
    assert torch.equal(twice.group, 2 * once.group)
    assert twice.rows == 80 * GROUP
