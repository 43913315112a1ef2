"""Which tokens are a prompt, whole or in pieces, and which of a prompt's tokens are padding."""

from __future__ import annotations

import copy

import pytest
import torch
from activation_cases import core_policy, decode, family_with, gate_policy, ids, linear_policy, plain_model
from transformers import StaticCache

import gossamer
from gossamer.compress.activation.calls import speculative
from gossamer.compress.activation.padding import real_tokens
from gossamer.kernels.modules.counting import counting

POLICIES = {"linear": linear_policy, "core": core_policy, "gate": gate_policy}


def sets_of(cache):
    return {name: [one.tolist() for one in sets] for name, sets in cache._gossamer_sequences._sets.items()}


def generated(model, given, **options):
    mask = options.pop("attention_mask", torch.ones_like(given))
    return model.generate(
        given, attention_mask=mask, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_prompt_in_pieces_is_the_whole_prompt(tmp_path, kind, size):
    model = gossamer.load(family_with("llama", tmp_path / "m", POLICIES[kind]("llama")))
    given = ids(2, 17)  # the last piece is one token
    whole, pieces = generated(model, given), generated(model, given, prefill_chunk_size=size)
    assert torch.equal(whole.sequences, pieces.sequences)
    for one, other in zip(whole.logits, pieces.logits, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    if kind == "core":
        assert sets_of(whole.past_key_values) == sets_of(pieces.past_key_values)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_short_turn_over_a_filled_cache_is_dense(tmp_path, kind):
    folder = family_with("llama", tmp_path / "m", POLICIES[kind]("llama"))
    model, plain, given, turn = gossamer.load(folder), plain_model(folder), ids(1, 9), ids(1, 5, seed=4)
    with torch.no_grad(), counting() as counted:
        cache = model(given, use_cache=True).past_key_values
        found = model(turn, past_key_values=cache, use_cache=True).logits
        wanted = plain(torch.cat([given, turn], 1)).logits[:, -5:]
    assert torch.allclose(found, wanted, atol=1e-4)
    assert counted.steps == 0
    if kind == "core":
        whole = model(torch.cat([given, turn], 1), use_cache=True).past_key_values
        assert sets_of(cache) == sets_of(whole)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("tokens", [3, 12])
def test_candidates_are_decoded_and_do_not_vote(tmp_path, kind, tokens):
    folder = family_with("llama", tmp_path / "m", POLICIES[kind]("llama"))
    model, given, more = gossamer.load(folder), ids(1, 9), ids(1, tokens, seed=5)
    with torch.no_grad(), counting() as counted:
        cache = model(given, use_cache=True).past_key_values
        before = sets_of(cache) if kind == "core" else None
        with speculative():
            found = model(more, past_key_values=cache, use_cache=True).logits
    assert counted.steps == 1
    if kind == "core":
        assert sets_of(cache) == before
    both = torch.cat([given, more], 1)
    wanted = decode(model, both, 9) if tokens <= 8 else plain_model(folder)(both).logits[:, 9:]  # 12 rows are dense
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_generate_with_candidates_decodes_them(tmp_path, how):
    policy = linear_policy("llama")
    model = gossamer.load(family_with("llama", tmp_path / "m", policy))
    given = ids(1, 4).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": copy.deepcopy(model)}
    calls = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with counting() as counted:
        found = generated(model, given, **options)
    assert max(calls[1:]) > 1
    assert counted.steps >= len(calls) - 1  # all but the prompt; an assistant's own steps count, too
    if how == "lookup":
        assert counted.steps == len(calls) - 1
        assert torch.equal(found.sequences, generated(model, given).sequences)
    with counting() as counted, torch.no_grad():  # afterwards several tokens are a prompt again
        model(ids(1, 3), past_key_values=found.past_key_values, use_cache=True)
    assert counted.steps == 0


def padded():
    one, long = ids(1, 7, seed=1), ids(1, 12, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), one], 1), long])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    return one, long, batch, mask


@pytest.mark.parametrize("kind", ["float", "bool", "static"])
def test_padding_does_not_vote_by_masks_of_four_dimensions(tmp_path, kind):
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama")))
    one, long, batch, mask = padded()
    columns = 20 if kind == "static" else 12
    seen = torch.zeros(2, 1, 12, columns, dtype=torch.bool)
    seen[..., :12] = torch.tril(torch.ones(12, 12, dtype=torch.bool)) & mask[:, None, None, :].bool()
    wide = seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    cache = StaticCache(config=model.config, max_cache_len=20) if kind == "static" else None
    with torch.no_grad():
        both = model(
            batch, attention_mask=wide, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        alone = [sets_of(model(x, use_cache=True).past_key_values) for x in (one, long)]
    for name, sets in sets_of(both.past_key_values).items():
        assert sets == [own[name][0] for own in alone]


@pytest.mark.parametrize("size", [None, 4])
def test_generate_with_a_static_cache_chooses_the_same_neurons(tmp_path, size):
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama")))
    _, _, batch, mask = padded()
    dynamic = generated(model, batch, attention_mask=mask)
    static = generated(
        model, batch, attention_mask=mask, cache_implementation="static", prefill_chunk_size=size, disable_compile=True
    )
    assert sets_of(static.past_key_values) == sets_of(dynamic.past_key_values)
    assert torch.equal(static.sequences, dynamic.sequences)


def test_real_tokens_by_positions():
    real = [[False, False, True, True, True], [True] * 5]
    for fill in (0, 1):
        positions = torch.tensor([[fill, fill, 0, 1, 2], [4, 5, 6, 7, 8]])
        window = torch.zeros(2, 1, 5, 4)  # columns of fewer tokens than there are
        assert real_tokens(window, positions, 2, 5, 4).tolist() == real
    assert real_tokens(None, None, 2, 5, 0) is None
    assert real_tokens(torch.zeros(2, 1, 5, 4), None, 2, 5, 4) is None
    assert real_tokens({"sliding_attention": None}, None, 2, 5, 4) is None
