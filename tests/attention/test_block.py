"""The short way of one token through an attention block: the very bits of the block's own forward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from headplans import plan_for, tiny
from transformers import DynamicCache, StaticCache

from gossamer.attention import block
from gossamer.attention.decode import adopt_attention
from gossamer.attention.ragged import RaggedLayer
from gossamer.compress.heads import applied, new_cache


@pytest.fixture
def counted(monkeypatch):
    """How many tokens went the short way."""
    calls, own = [], RaggedLayer.take_one
    monkeypatch.setattr(RaggedLayer, "take_one", lambda self, *args: calls.append(self.index) or own(self, *args))
    return calls


def decode(model, short: bool, dtype) -> torch.Tensor:
    ids = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with applied(model.to(dtype), plan_for(model, 2), cache="ragged"), torch.no_grad():
        for module in model.modules() if not short else ():
            block.restore(module)
        cache, out = new_cache(model), []
        for begin, end in [(0, 9), *((i, i + 1) for i in range(9, 30))]:
            out.append(
                model(
                    ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                    past_key_values=cache, use_cache=True,
                ).logits
            )  # fmt: skip
    assert cache.get_seq_length() == 30
    return torch.cat(out, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "more"), [("Llama", {}), ("Llama", {"attention_bias": True}), ("Qwen2", {}),
                                        ("Mistral", {"sliding_window": 9})])  # fmt: skip
def test_the_same_bits_as_the_blocks_own_forward(kind, more, dtype, counted):
    model = tiny(kind, **more)
    wanted = decode(model, False, dtype)
    assert not counted
    found = decode(model, True, dtype)
    assert len(counted) == 21 * model.config.num_hidden_layers  # every single token, of every layer
    assert torch.equal(found, wanted)


def test_blocks_of_another_kind_keep_their_own(counted):
    """Qwen3 norms query and key; a class whose forward somebody has changed; a forward of the module's own."""
    decode(tiny("Qwen3"), True, torch.float32)
    model = tiny("Llama")
    kind = type(model.model.layers[0].self_attn)
    changed = type("Changed", (kind,), {"forward": lambda self, *args, **more: kind.forward(self, *args, **more)})
    for layer in model.model.layers:
        layer.self_attn.__class__ = changed
    decode(model, True, torch.float32)
    model = tiny("Llama")
    for layer in model.model.layers:
        layer.self_attn.forward = layer.self_attn.forward
    decode(model, True, torch.float32)
    assert not counted


def test_the_short_way_goes_with_the_plan_and_with_a_copy(counted):
    model = tiny("Llama")
    with applied(model, plan_for(model), cache="ragged"):
        twin = copy.deepcopy(model)
        assert all("forward" in layer.self_attn.__dict__ for layer in model.model.layers)
        for layer in twin.model.layers:
            assert layer.self_attn.forward.args == (layer.self_attn,)
    assert not any("forward" in layer.self_attn.__dict__ for layer in model.model.layers)
    with applied(model, plan_for(model), cache="masked"):
        assert not any("forward" in layer.self_attn.__dict__ for layer in model.model.layers)


def test_gradients_and_padding_go_the_long_way(counted):
    model = tiny("Llama")
    with applied(model, plan_for(model), cache="ragged"):
        cache = new_cache(model)
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7], [0, 8, 9]]), past_key_values=cache, use_cache=True)
            mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])  # padding in the middle of a turn
            model(torch.tensor([[5], [0]]), attention_mask=mask, past_key_values=cache, use_cache=True)
        assert not counted


def said(model, ids, cache):
    """Logits of a prompt of 9 tokens, then token by token."""
    parts = [(0, 9), *((i, i + 1) for i in range(9, 30))]
    with torch.no_grad():
        return torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in parts], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "more"), [("Llama", {}), ("Llama", {"attention_bias": True}), ("Qwen2", {}),
                                        ("Mistral", {"sliding_window": None})])  # fmt: skip
def test_the_same_bits_with_ordinary_caches(kind, more, dtype, monkeypatch):
    usual = tiny(kind, **more).to(dtype)
    adopt_attention(usual)
    model = copy.deepcopy(usual)
    for module in model.modules():
        block.shorten(module)
    calls: list[int] = []
    attend = block.decode_attention
    monkeypatch.setattr(block, "decode_attention", lambda *a, **more: calls.append(1) or attend(*a, **more))
    ids = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(5))
    wanted = said(usual, ids, DynamicCache(config=usual.config))
    assert not calls
    assert torch.equal(said(model, ids, DynamicCache(config=model.config)), wanted)
    assert len(calls) == 21 * model.config.num_hidden_layers
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(said(twin, ids, DynamicCache(config=model.config)), wanted)
    assert len(calls) == 42 * model.config.num_hidden_layers
    # Caches of a fixed length bring a mask, and other attention functions are somebody's wish: both as ever.
    static = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(said(model, ids, static), said(usual, ids, StaticCache(config=usual.config, max_cache_len=40)))
    model.set_attn_implementation("eager")
    usual.set_attn_implementation("eager")
    assert torch.equal(said(model, ids, DynamicCache()), said(usual, ids, DynamicCache()))
    assert len(calls) == 42 * model.config.num_hidden_layers


@torch.no_grad()
def test_a_window_of_the_model_brings_a_mask(monkeypatch):
    usual = tiny("Mistral", sliding_window=9)
    adopt_attention(usual)
    model = copy.deepcopy(usual)
    for module in model.modules():
        block.shorten(module)
    ids = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(5))
    found, wanted = (said(m, ids, DynamicCache(config=m.config)) for m in (model, usual))
    assert torch.equal(found, wanted)
