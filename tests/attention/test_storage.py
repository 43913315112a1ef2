"""Memory is really given back: bytes of every tensor that a cache can reach, against the plan's."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from headplans import plan_for, tiny

from gossamer.attention.layout import GRAIN, grid
from gossamer.attention.plan import FULL, HeadPlan, HeadRule
from gossamer.attention.ragged import RaggedCache, RaggedLayer
from gossamer.compress.heads import applied, apply, new_cache, remove
from gossamer.errors import ModelError


def reachable_bytes(root: object) -> int:
    """untyped_storage().nbytes() of all tensors found by following references, each storage once."""
    seen, sizes, queue = set(), {}, [root]
    while queue:
        one = queue.pop()
        if id(one) in seen or isinstance(one, (type, type(gc))) or callable(one) and not isinstance(one, torch.Tensor):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        queue += gc.get_referents(one)
    return sum(sizes.values())


def fill(cache: RaggedCache, model, length: int, batch: int = 1) -> None:
    with torch.no_grad():
        ids = torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(length))
        model(ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(("length", "decoded"), [(1024, 0), (1024, 100), (1100, 100), (3000, 0)])
def test_bytes_are_those_of_the_plan(length, decoded):
    model = tiny("Llama", max_position_embeddings=4096, head_dim=64)
    rules = [HeadRule(4, 200, 0.0), HeadRule(64, 0, 0.25), HeadRule(0, 900, 0.125), FULL]
    plan = plan_for(model, rules=rules, block=64, seed=1)
    apply(model, plan)
    cache = new_cache(model)
    fill(cache, model, length, batch=2)
    step = torch.tensor([[5], [6]])
    with torch.no_grad():
        for _ in range(decoded):
            model(step, past_key_values=cache, use_cache=True)
    wanted = plan.kv_bytes(length + decoded, batch=2, element_size=4)
    assert 0 <= reachable_bytes(cache) / wanted - 1 < 0.02
    assert wanted < 0.8 * plan.dense_kv_bytes(length + decoded, batch=2, element_size=4)


def test_a_reset_gives_everything_back():
    model = apply(tiny("Llama"), plan_for(tiny("Llama")))
    cache = new_cache(model)
    fill(cache, model, 50)
    cache.reset()
    assert reachable_bytes(cache) < 1000
    assert cache.get_seq_length() == 0
    fill(cache, model, 20)
    assert cache.get_seq_length() == 20


def test_the_grid():
    lengths = [grid(n) for n in range(1, 40000)]
    assert all(a >= n for n, a in enumerate(lengths, 1))
    assert lengths == sorted(lengths)
    assert all(a <= max(n + GRAIN - 1, n * 65 / 64 + 1) for n, a in enumerate(lengths, 1))
    assert all(grid(2**k) == 2**k for k in range(4, 20))


@torch.no_grad()
@pytest.mark.parametrize("touched", [0, 1])
def test_a_model_that_changes_keys_falls_back_to_masks(monkeypatch, touched):
    model = tiny("Llama")
    plan, ids = plan_for(model), torch.randint(2, 97, (2, 30))
    with applied(model, plan, cache="masked"):
        wanted = model.generate(ids, max_new_tokens=30, do_sample=False)
    usual = RaggedLayer.update
    outside = lambda pair: tuple(t * 1.0 if i == touched else t for i, t in enumerate(pair))
    monkeypatch.setattr(RaggedCache, "update", lambda self, k, v, i, *a: outside(usual(self.layers[i], k, v)))
    with applied(model, plan, cache="ragged"), pytest.warns(RuntimeWarning, match="kept by masks") as told:
        found = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(found, wanted)
    assert len(told) == 1


@torch.no_grad()
def test_a_model_that_changes_keys_later_is_told():
    model = tiny("Llama")
    apply(model, plan_for(model))
    cache = new_cache(model)
    fill(cache, model, 10)
    keys, _ = cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    with pytest.raises(ModelError, match="asks for 'shape' of keys or values"):
        _ = keys.shape


def test_what_cannot_be():
    model = tiny("Llama")
    plan = plan_for(model)
    other = HeadPlan("llama", 6, 8, 4, (64,), 512, plan.heads[:2])
    with pytest.raises(ModelError, match="layers 2 \\(the model: 3\\)"):
        apply(model, other)
    with pytest.raises(ModelError, match="model type llama \\(the model: qwen2\\)"):
        apply(tiny("Qwen2"), plan)
    apply(model, plan)
    cache = new_cache(model)
    fill(cache, model, 10)
    with pytest.raises(ModelError, match="cannot take tokens back"):
        cache.crop(-1)
    remove(model)
    assert new_cache(model) is None
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_taken_off_it_is_the_old_model():
    model, ids = tiny("Llama"), torch.randint(2, 97, (1, 40))
    before = model(ids).logits
    apply(model, plan_for(model))
    assert not torch.equal(model(ids).logits, before)
    remove(model)
    assert torch.equal(model(ids).logits, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, max_new_tokens=3, do_sample=False)
