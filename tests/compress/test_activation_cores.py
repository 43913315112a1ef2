"""Core neurons and gate thresholds at run time: a state per sequence, from its prompt alone, against hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from activation_cases import core_policy, decode, family_with, gate_policy, give, ids, plain_model
from exports import dense_twin, save_family_sparse
from transformers.models.llama.modeling_llama import LlamaMLP

import gossamer
from gossamer.activation_sparsity.base import CoreNeurons
from gossamer.activation_sparsity.cores import nearest_cluster, stable_core
from gossamer.compress.activation.calls import speculative
from gossamer.compress.activation.report import realised
from gossamer.compress.generate import generate
from gossamer.kernels.modules.counting import counting
from gossamer.kernels.modules.masked import ACTIVATIONS

GATED, PLAIN = ["llama", "qwen2", "gemma2", "phi3"], ["opt", "gpt2", "phi"]


def close(a, b, tolerance=2e-4):
    assert torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance), (a.float() - b.float()).abs().max()


def masked(model, policy):
    """A plain model whose down layers see zeros outside the core neurons of one sequence, by hooks."""
    prompt, sets, state = {}, {}, {"prompt": True}

    def choose():
        guide = policy.guide
        if guide.mode == "similarity":
            own = policy.mlps[guide.signature]
            cluster = nearest_cluster(prompt[guide.signature], own, guide)
            return {name: entry.clusters[cluster] for name, entry in policy.mlps.items()}
        return {name: stable_core(prompt[name], entry, guide.alpha) for name, entry in policy.mlps.items()}

    for name, entry in policy.mlps.items():

        def before(layer, args, name=name, entry=entry):
            inner = args[0]
            if inner.numel() > inner.shape[-1]:  # the prompt
                prompt[name] = inner.reshape(-1, inner.shape[-1])[1:]
                state["prompt"] = True
                return None
            if isinstance(entry, CoreNeurons):
                if state["prompt"]:
                    sets.update(choose())
                    state["prompt"] = False
                mask = torch.zeros(inner.shape[-1]).index_fill_(0, sets[name].long(), 1.0)
            else:
                mask = state[name]
            return (inner * mask.to(inner.dtype),)

        model.get_submodule(entry.parts.down).register_forward_pre_hook(before)
        if not isinstance(entry, CoreNeurons):

            def after(layer, args, y, name=name, entry=entry):
                gate = y.chunk(2, -1)[0] if entry.parts.fused else y
                act = ACTIVATIONS[entry.parts.activation]
                state[name] = (act(gate).abs() > entry.threshold).float()

            model.get_submodule(entry.parts.gate).register_forward_hook(after)
    return model, sets


@pytest.mark.parametrize("similarity", [False, True])
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in (GATED[0], PLAIN[0]) else pytest.mark.slow) for f in (*GATED, *PLAIN)]
)
def test_core_neurons_of_the_prompt(tmp_path, family, similarity):
    policy = core_policy(family, similarity=similarity)
    folder = family_with(family, tmp_path / "m", policy)
    model, given = gossamer.load(folder), ids(1, 16)
    applied = model.gossamer_activation
    assert len(applied.mlps if family in GATED else applied.fallback) == len(policy.mlps)
    plain, sets = masked(plain_model(folder), policy)
    found = decode(model, given, 11)
    close(found, decode(plain, given, 11))
    assert all(len(one) == policy.mlps[name].keep for name, one in sets.items())
    assert not torch.allclose(found, decode(plain_model(folder), given, 11), atol=1e-2)
    close(found, decode(gossamer.load(folder, backend="reference"), given, 11))
    close(found, decode(gossamer.load(folder, packed=False), given, 11))


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_gate_thresholds(tmp_path, family):
    policy = gate_policy(family)
    folder = family_with(family, tmp_path / "m", policy)
    model, given = gossamer.load(folder), ids(1, 16)
    assert len(model.gossamer_activation.mlps) == 3 or family == "gemma2"
    wanted = decode(masked(plain_model(folder), policy)[0], given, 11)
    close(decode(model, given, 11), wanted)
    close(decode(gossamer.load(folder, backend="reference"), given, 11), wanted)
    close(decode(gossamer.load(folder, packed=False), given, 11), wanted)
    assert not torch.allclose(wanted, decode(plain_model(folder), given, 11), atol=1e-3)


def sets_of(cache):
    return {name: [one.tolist() for one in sets] for name, sets in cache._gossamer_sequences._sets.items()}


def test_later_tokens_do_not_change_the_set(tmp_path):
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama")))
    given = ids(2, 9)
    with torch.no_grad():
        cache = model(given, use_cache=True).past_key_values
        before = sets_of(cache)
        for seed in range(5):
            model(ids(2, 1, seed=seed), past_key_values=cache, use_cache=True)
        assert sets_of(cache) == before
        # more of the prompt votes too, and in pieces it is the whole prompt
        whole = model(torch.cat([given, ids(2, 20, seed=7)], 1), use_cache=True).past_key_values
        first = model(given, use_cache=True).past_key_values
        model(ids(2, 20, seed=7), past_key_values=first, use_cache=True)
    assert sets_of(first) == sets_of(whole) != before


def test_sequences_in_turns_and_copied_keep_their_own(tmp_path):
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama")))
    one, other, step = ids(1, 9, seed=1), ids(1, 9, seed=2), ids(1, 1, seed=3)
    with torch.no_grad():
        wanted = decode(model, torch.cat([one, step], 1), 9)
        first = model(one, use_cache=True).past_key_values
        saved = copy.deepcopy(first)
        second = model(other, use_cache=True).past_key_values
        assert sets_of(first) != sets_of(second)
        for cache in (first, saved):
            model(step, past_key_values=second, use_cache=True)
            out = model(step, past_key_values=cache, use_cache=True)
            assert torch.equal(out.logits[:, -1], wanted[:, 0])
    with torch.no_grad(), speculative():  # several decoded tokens at once: each takes the sequence's neurons
        cache = model(one, use_cache=True).past_key_values
        block = model(ids(1, 3, seed=5), past_key_values=cache, use_cache=True).logits
        close(block, decode(model, torch.cat([one, ids(1, 3, seed=5)], 1), 9), 1e-4)


def test_padding_does_not_vote(tmp_path):
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama")))
    one, long = ids(1, 7, seed=1), ids(1, 12, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), one], 1), long])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        both = model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
        alone = model(one, use_cache=True), model(long, use_cache=True)
    for name, sets in sets_of(both.past_key_values).items():
        assert sets == [sets_of(out.past_key_values)[name][0] for out in alone]


def test_generate_by_transformers_and_by_us_give_the_same_tokens(tmp_path):
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama")))
    given = ids(2, 9)
    ours = torch.stack(list(generate(model, given, 8)), 1)
    theirs = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(ours, theirs[:, 9:])
    beams = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape[0] == 2


def test_a_refresh_takes_a_new_set_when_the_text_drifts(tmp_path):
    policy = core_policy("llama", refresh=4, drift=1.0)
    model = gossamer.load(family_with("llama", tmp_path / "m", policy))
    with torch.no_grad():
        cache = model(ids(2, 9), use_cache=True).past_key_values
        before = sets_of(cache)
        for i in range(3):
            model(ids(2, 1, seed=i), past_key_values=cache, use_cache=True)
            assert sets_of(cache) == before
        model(ids(2, 1, seed=9), past_key_values=cache, use_cache=True)
    after = sets_of(cache)
    assert after != before
    assert all(len(one) == policy.mlps[name].keep for name, sets in after.items() for one in sets)


def test_counted_with_a_refresh_are_all_steps(tmp_path):
    """Of every four tokens, one computes all neurons."""
    model = gossamer.load(family_with("llama", tmp_path / "m", core_policy("llama", 0.4, refresh=4)))
    with counting() as counted:
        decode(model, ids(1, 17), 9)
    layers = realised(model, counted)["layers"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert layers[f"model.layers.0.mlp.{name}"] == pytest.approx(0.75 * (1 - 32 / 80))


def test_counted_neurons_and_a_prompt_without_voters(tmp_path):
    policy = core_policy("llama", 0.4)
    model = gossamer.load(family_with("llama", tmp_path / "m", policy))
    with counting() as counted:
        decode(model, ids(1, 12), 9)
    result = realised(model, counted)
    assert result["layers"]["model.layers.0.mlp.up_proj"] == pytest.approx(1 - 32 / 80)
    assert result["layers"]["model.layers.0.self_attn.q_proj"] == 0.0
    with counting() as counted:
        decode(model, ids(1, 3), 1)  # the first token does not vote: all neurons
    assert realised(model, counted)["skipped"] == pytest.approx(0.0)


def test_an_mlp_that_does_more_keeps_its_module(tmp_path, monkeypatch):
    """A factor behind down is nowhere in gate, up and down: the prompt would be of another model."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 0.5 * forward(self, x))
    policy = core_policy("llama")
    folder = family_with("llama", tmp_path / "m", policy)
    model, given = gossamer.load(folder), ids(1, 16)
    assert model.gossamer_activation.mlps == []
    assert all("more than its three maps" in why for why in model.gossamer_activation.fallback.values())
    plain, _ = masked(plain_model(folder), policy)
    close(decode(model, given, 11), decode(plain, given, 11))


def test_packed_mlps_are_expanded_for_core_neurons(tmp_path):
    policy = core_policy("llama")
    folder = give(save_family_sparse("llama", tmp_path / "m", dtype=torch.bfloat16), policy)
    model, given = gossamer.load(folder), ids(1, 14)
    assert len(model.gossamer_activation.mlps) == 3
    dense = dense_twin(folder, tmp_path / "dense")
    wanted = decode(masked(plain_model(dense, torch.bfloat16), policy)[0], given, 11)
    found = decode(model, given, 11)
    assert ((found - wanted).norm() / wanted.norm()) < 0.15
    model.save_pretrained(tmp_path / "again")
    again = gossamer.load(tmp_path / "again")
    assert torch.equal(decode(again, given, 11), found)
    assert again.gossamer_masks.keys() == model.gossamer_masks.keys()
