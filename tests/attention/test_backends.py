"""One semantics, many ways: masks, blocks, flex_attention, ragged decoding in torch, in C++ and as on GPUs."""

from __future__ import annotations

import pytest
import torch
from headplans import plan_for, tiny

from gossamer.attention import chunk, flex
from gossamer.attention.mask import UNLIMITED
from gossamer.attention.plan import FULL, HeadPlan, HeadRule
from gossamer.attention.ragged import RaggedCache
from gossamer.compress.heads import apply
from gossamer.kernels import tier
from gossamer.kernels.window_attention import cuda, reference

RULES = [HeadRule(3, 40, 0.0), HeadRule(130, 20, 0.0), HeadRule(1, -30, 0.5), HeadRule(0, 9, 0.25), FULL]


@pytest.fixture(scope="module")
def case():
    model = tiny("Llama", max_position_embeddings=1024)
    plan = plan_for(model, rules=RULES, seed=2)
    ids = torch.randint(2, 97, (2, 400), generator=torch.Generator().manual_seed(3))
    apply(model, plan)
    with torch.no_grad():
        return model, plan, ids, model(ids, use_cache=False).logits


def run(model, plan, ids, cuts, prefill="blocks"):
    cache, found = RaggedCache(plan, prefill=prefill), []
    with torch.no_grad():
        for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            found.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("prefill", ["blocks", "flex"])
@pytest.mark.parametrize("cuts", [[], [300], [7, 137, 140, 396]])
def test_prefill(case, prefill, cuts):
    model, plan, ids, wanted = case
    torch.testing.assert_close(run(model, plan, ids, cuts, prefill), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["torch", *tier.NAMES])
def test_decode(case, name):
    model, plan, ids, wanted = case
    if name != "torch" and name not in tier.available():
        pytest.skip(f"no tier {name} here")
    with tier.forced(None if name == "torch" else name):
        found = run(model, plan, ids, range(350, 400))
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def varlen(query, key, value, begin_q, begin_k, max_q, max_k, *, return_aux, scale, enable_gqa, seqused_k):
    """What torch's varlen_attn computes, for one query per sequence and one KV head; garbage where there is no key."""
    assert (query.shape[0], max_q, key.shape[1]) == (int(begin_q[-1]), 1, 1)
    assert len(begin_k) == query.shape[0] + 1
    assert return_aux.lse
    assert enable_gqa == (query.shape[1] > 1)
    assert max_k >= seqused_k.max()
    out, lse = torch.full_like(query, 1e9), torch.full(query.shape[:2], float("inf"))
    for i, (begin, count) in enumerate(zip(begin_k.tolist(), seqused_k.tolist(), strict=False)):
        if count:
            scores = scale * query[i].float() @ key[begin : begin + count, 0].float().t()
            lse[i] = scores.logsumexp(-1)
            out[i] = (scores.softmax(-1) @ value[begin : begin + count, 0].float()).to(out.dtype)
    return out, lse


@pytest.mark.parametrize("group", [1, 4])
def test_ranges_as_sequences_of_a_gpu(monkeypatch, group):
    """The calls for GPUs, with varlen_attn written out."""
    monkeypatch.setattr(cuda, "varlen_attn", varlen)
    keys, values = torch.randn(200, 16), torch.randn(200, 16)
    query = torch.randn(2, 2 * group, 16)
    ranges = torch.tensor([[[0, 20, 30, 50], [90, 0, 95, 7]], [[110, 1, 110, 0], [120, 0, 120, 0]]])
    wanted = reference.window_attention(query, keys, values, ranges, 0.3)
    torch.testing.assert_close(cuda.window_attention(query, keys, values, ranges, 0.3), wanted)


@pytest.mark.parametrize("reach", [UNLIMITED, 77])
@pytest.mark.parametrize("rule", RULES)
def test_tables_of_tiles(rule, reach):
    """Exactly the tiles with a pair that is seen; full ones only where all pairs are."""
    plan = HeadPlan("m", 1, 8, 4, (8,), None, ((rule,),))
    for start, stored in ((0, 0), (300, 300), (517, 200)):
        queries = torch.arange(start, start + 391)
        kept = torch.arange(start)[: rule.sink].tolist() + list(
            range(max(start - stored, min(rule.sink, start)), start)
        )
        keys = torch.tensor(kept + queries.tolist())
        table = flex.block_mask(queries, keys, rule, 4, reach)
        seen = plan.visible(0, queries, keys)[0] & (keys > queries[:, None] - reach)
        assert torch.equal(chunk.seen_by(rule, 4, queries[:, None], keys[None, :], reach), seen)
        some, full = (torch.zeros(table.kv_indices.shape[2:], dtype=torch.bool) for _ in range(2))
        for found, counts, order in (
            (some, table.kv_num_blocks, table.kv_indices), (full, table.full_kv_num_blocks, table.full_kv_indices),
        ):  # fmt: skip
            for row, count in enumerate(counts[0, 0].tolist()):
                found[row, order[0, 0, row, :count].long()] = True
        assert not (some & full).any()
        for row in range(some.shape[0]):
            for tile in range(some.shape[1]):
                part = seen[128 * row : 128 * row + 128, 128 * tile : 128 * tile + 128]
                assert part.any() <= (some | full)[row, tile], (row, tile)
                assert full[row, tile] <= part.all(), (row, tile)
        assert full.any() or rule.kept(400, 4) < 140 or reach < 128  # what is full is not asked key by key
