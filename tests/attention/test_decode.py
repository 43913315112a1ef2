"""One token's attention over ordinary caches: float64, transformers' own function, whole models of several kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from headplans import plan_for, tiny
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import gossamer
from gossamer.attention import decode
from gossamer.compress.heads import apply, remove
from gossamer.kernels.tier import current

pytestmark = pytest.mark.skipif(current() is None, reason="the compiled kernels are not there")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Block(nn.Module):
    """What transformers' function asks of an attention module."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def inputs(batch, heads, kv_heads, length, width, dtype, queries=1):
    generator = torch.Generator().manual_seed(length)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    # As a block makes it: [batch, q, heads, D], turned.
    query = draw(batch, queries, heads, width).transpose(1, 2)
    return query, draw(batch, kv_heads, length, width), draw(batch, kv_heads, length, width)


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (5, 5), (8, 4)])
@pytest.mark.parametrize(("length", "width"), [(1, 8), (7, 64), (63, 80), (400, 128), (33, 256)])
def test_it_is_attention(dtype, heads, length, width):
    for batch, scale in ((1, None), (3, 0.3)):
        query, key, value = inputs(batch, *heads, length, width, dtype)
        out, _ = decode.decode_attention(Block(heads[0] // heads[1]), query, key, value, None, scaling=scale)
        assert out.shape == (batch, 1, heads[0], width)
        assert out.dtype is dtype
        for b in range(batch):
            for h in range(heads[0]):
                k, v = (x[b, h * heads[1] // heads[0]].double() for x in (key, value))
                shares = (k @ query[b, h, 0].double() * (width**-0.5 if scale is None else scale)).softmax(0)
                torch.testing.assert_close(
                    out[b, 0, h].double(), shares @ v, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
                )


def asked(monkeypatch):
    """How often the kernel is asked, as a list."""
    calls: list[int] = []
    usual = decode.window_attention
    monkeypatch.setattr(decode, "window_attention", lambda *words: calls.append(1) or usual(*words))
    return calls


@torch.no_grad()
def test_everything_else_is_transformers_own(monkeypatch):
    calls = asked(monkeypatch)
    query, key, value = inputs(2, 8, 4, 20, 16, torch.float32)
    several = inputs(2, 8, 4, 20, 16, torch.float32, queries=3)
    seen = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    seen[1, ..., :5] = False
    thin = torch.randn(2, 4, 20, 8)
    turned = key.transpose(2, 3).contiguous().transpose(2, 3)
    cases = [
        ((*several, None), {}),
        ((query, key, value, seen), {}),
        ((query, key, thin, None), {}),
        ((query, turned, value, None), {}),
        ((query, key, value, None), {"position_bias": torch.randn(1, 8, 1, 20)}),
        ((query.double(), key.double(), value.double(), None), {}),
    ]
    for words, rest in cases:
        out, _ = decode.decode_attention(Block(2), *words, **rest)
        assert torch.equal(out, sdpa_attention_forward(Block(2), *words, **rest)[0])
    with torch.enable_grad():
        out, _ = decode.decode_attention(Block(2), query.requires_grad_(), key, value, None)
        out.sum().backward()
    assert not calls
    with pytest.raises(ValueError, match="softcap"):
        decode.decode_attention(Block(2), query, key, value, None, softcap=30.0)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "cpu_ready", lambda: False)
        decode.decode_attention(Block(2), query, key, value, None)
    assert not calls
    decode.decode_attention(Block(2), query, key, value, None)
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
def test_models_say_what_they_said(kind, monkeypatch):
    """Greedy text alone, and in a batch with padding on the left, which goes the usual way."""
    usual = tiny(kind)
    model = copy.deepcopy(usual)
    decode.adopt_attention(model)
    assert model.config._attn_implementation == decode.NAME
    calls = asked(monkeypatch)
    ids = torch.randint(2, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), usual.generate(ids, **options))
    assert len(calls) == 23 * usual.config.num_hidden_layers
    ids[0, :5] = 0
    mask = (ids != 0).long()
    said = [m.generate(ids, attention_mask=mask, **options) for m in (model, usual)]
    assert torch.equal(*said)
    assert len(calls) == 23 * usual.config.num_hidden_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("decode") / "model"
    tiny("Llama").save_pretrained(where)
    return where


def test_loaded_models_have_it_unless_another_is_asked_for(folder, tmp_path):
    model = gossamer.load(folder)
    assert model.config._attn_implementation == decode.NAME
    assert gossamer.load(folder, packed=False).config._attn_implementation == "sdpa"
    assert gossamer.load(folder, attn_implementation="eager").config._attn_implementation == "eager"
    model.save_pretrained(tmp_path / "saved")
    assert decode.NAME not in (tmp_path / "saved" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert plain.config._attn_implementation == "sdpa"


def test_a_head_plan_goes_before_and_gives_it_back(folder):
    model = gossamer.load(folder)
    apply(model, plan_for(model))
    assert model.config._attn_implementation == "gossamer_heads"
    remove(model)
    assert model.config._attn_implementation == decode.NAME
