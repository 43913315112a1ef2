"""Ragged caches and masks where models, caches and callers do something unusual: other caches, shared keys, autocast,
packed sequences, gradients, groups without a kernel."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from headplans import LAYERS, plan_for, tiny

from gossamer.attention.plan import HeadPlan, HeadRule
from gossamer.attention.ragged import RaggedCache
from gossamer.compress.heads import applied, new_cache
from gossamer.errors import ModelError

IDS = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(3))
GREEDY = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 20, "do_sample": False}


def padding():
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    return mask


@pytest.mark.parametrize("cache", ["ragged", "masked"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@torch.no_grad()
def test_static_caches_in_generate(kind, cache):
    model = tiny(kind, **({"sliding_window": 9} if kind == "Mistral" else {}))
    greedy = GREEDY | {"attention_mask": padding()}
    with applied(model, plan_for(model), cache=cache):
        wanted = model.generate(IDS, **greedy)
        assert torch.equal(model.generate(IDS, cache_implementation="static", **greedy), wanted)
        static = transformers.StaticCache(config=model.config, max_cache_len=60)
        assert torch.equal(model.generate(IDS, past_key_values=static, **greedy), wanted)
        compiled = transformers.CompileConfig()
        compiled._compile_all_devices = True  # as on a GPU
        found = model.generate(IDS, cache_implementation="static", compile_config=compiled, **greedy)
        assert torch.equal(found, wanted)
    assert "create_masks_for_generate" not in model.__dict__
    assert "_valid_auto_compile_criteria" not in model.__dict__


def gemma3n():
    values = {
        "vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size": 48, "intermediate_size": [64] * 4,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None,
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12,
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
    }  # fmt: skip
    torch.manual_seed(1)
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**values)).eval()


@torch.no_grad()
def test_layers_that_share_keys_fall_back_to_masks_with_one_warning():
    model = gemma3n()
    plan = plan_for(model)
    for prompt in (30, 1):
        with applied(model, plan, cache="masked"):
            wanted = model(IDS, use_cache=False).logits
        with applied(model, plan, cache="ragged"), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            cache = new_cache(model)
            pieces = [slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, 30))]
            found = [model(IDS[:, piece], past_key_values=cache).logits for piece in pieces]
            model.generate(IDS, **GREEDY)
        torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-4, rtol=1e-4)
        said = [str(w.message) for w in seen if "shares them between layers" in str(w.message)]
        assert len(said) == 2  # one for each cache
        assert [layer.keys is not None for layer in cache.layers] == [True, True, False, False]


@torch.no_grad()
def test_autocast():
    model = tiny("Llama")
    with applied(model, plan_for(model), cache="ragged"), torch.autocast("cpu", torch.bfloat16):
        wanted = model(IDS, attention_mask=padding(), use_cache=False).logits
        cache = new_cache(model)
        found = [
            model(IDS[:, a:b], attention_mask=padding()[:, :b], past_key_values=cache).logits
            for a, b in ((0, 12), (12, 20), *((i, i + 1) for i in range(20, 30)))
        ]
    real = padding().bool()
    difference = (torch.cat(found, 1)[real].float() - wanted[real].float()).abs()
    assert difference.max() < 0.1 * wanted[real].float().abs().max()
    with applied(model, plan_for(model), cache="ragged"):  # further tokens without it
        assert model(IDS[:, :1], past_key_values=cache).logits.dtype == torch.float32


@pytest.mark.parametrize("way", ["no cache", "another cache", "ragged"])
@torch.no_grad()
def test_packed_sequences_are_refused(way):
    model = tiny("Llama")
    packed = torch.cat([torch.arange(18), torch.arange(12)])[None].expand(2, -1)
    with applied(model, plan_for(model), cache="ragged"):
        given = {"use_cache": False} if way == "no cache" else {}
        if way == "ragged":
            given = {"past_key_values": new_cache(model)}
        model(IDS, position_ids=torch.arange(5, 35)[None], **given)
        if way == "ragged":
            given = {"past_key_values": new_cache(model)}
        with pytest.raises(ModelError, match="position_ids restart within a row"):
            model(IDS, position_ids=packed, **given)
        # Restarts at padding are none, wherever it is.
        mask = torch.ones_like(IDS)
        mask[0, :6], mask[1, 11:15], mask[1, 28:] = 0, 0, 0
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        if way == "ragged":
            given = {"past_key_values": new_cache(model)}
        model(IDS, attention_mask=mask, position_ids=positions, **given)


def test_decode_under_grad():
    """What is stored carries no gradient; the new tokens do."""
    model = tiny("Llama")
    with applied(model, plan_for(model), cache="ragged"):
        with torch.no_grad():
            wanted = model(IDS, use_cache=False).logits
        cache = new_cache(model)
        found = [model(IDS[:, :20], past_key_values=cache).logits]
        found += [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
        torch.testing.assert_close(torch.cat(found, 1).detach(), wanted, atol=2e-4, rtol=1e-4)
        found[-1].sum().backward()
        assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
        assert not any(layer.store.keys.requires_grad for layer in cache.layers)


@pytest.mark.parametrize(("heads", "dtype"), [(65, torch.float32), (6, torch.float64)])
@torch.no_grad()
def test_what_the_kernel_cannot_do_runs_in_torch(heads, dtype):
    model = tiny("Llama", hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=1).to(dtype)
    config = model.config
    rules = tuple((HeadRule(2, 9 + layer, 0.0),) for layer in range(LAYERS))
    plan = HeadPlan(config.model_type, heads, config.head_dim, 4, (64,), 512, rules)
    with applied(model, plan, cache="masked"):
        wanted = model.generate(IDS, **GREEDY)
    with applied(model, plan, cache="ragged"):
        found = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
    assert isinstance(found.past_key_values, RaggedCache)
    assert torch.equal(found.sequences, wanted)
