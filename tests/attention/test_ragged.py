"""A ragged cache gives what the mask gives: token for token, in every way that transformers runs a model."""

from __future__ import annotations

import pytest
import torch
from headplans import plan_for, tiny

from gossamer.attention.plan import HeadRule
from gossamer.compress.heads import applied, new_cache

KINDS = [("Llama", {}), ("Qwen2", {}), ("Mistral", {"sliding_window": None}), ("Mistral", {"sliding_window": 9})]
NAMES = [kind + str(more.get("sliding_window", "")) for kind, more in KINDS]


@pytest.fixture(params=KINDS, ids=NAMES)
def model(request):
    kind, more = request.param
    return tiny(kind, **more)


def prompts(batch: int, length: int, seed: int = 0):
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int):
    ids = prompts(batch, length)
    mask = torch.ones_like(ids)
    for row, pads in enumerate([0, 5, 17][:batch]):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, plan, run):
    """What `run` gives with masks and all keys, and with a ragged cache."""
    with applied(model, plan, cache="masked"):
        wanted = run(model)
    with applied(model, plan, cache="ragged"):
        return wanted, run(model)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_greedy_with_left_padding(model, seed):
    plan = plan_for(model, seed)
    dense = model.generate(**padded(3, 37), max_new_tokens=60, do_sample=False)
    wanted, found = both(
        model, plan, lambda m: m.generate(
            **padded(3, 37), max_new_tokens=60, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    )  # fmt: skip
    best = torch.stack(wanted.scores, 1).topk(2, -1).values
    clear = ((best[..., 0] - best[..., 1]) > 1e-4).cumprod(1).bool()  # until two tokens are as good as equal
    assert clear.float().mean() > 0.6
    assert torch.equal(found.sequences[:, 37:][clear], wanted.sequences[:, 37:][clear])
    assert not torch.equal(dense, wanted.sequences)  # the plan does something


@torch.no_grad()
def test_beams(model):
    run = lambda m: m.generate(
        **padded(3, 21),
        max_new_tokens=30,
        num_beams=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    wanted, found = both(model, plan_for(model, 3), run)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[1], [40], [1, 1, 2], [13, 17], [3, 29, 6], [39]])
@torch.no_grad()
def test_logits_of_a_prompt_in_pieces(model, cuts):
    """Also pieces longer than any window, a first piece of one token, and pieces that are all padding in some rows."""
    plan, given = plan_for(model, 1), padded(3, 41)
    ids, mask = given["input_ids"], given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with applied(model, plan, cache="ragged"):
        wanted = model(**given, position_ids=positions, use_cache=False).logits  # no cache: the mask alone
        cache, pieces, begin = new_cache(model), [], 0
        for length in [*cuts, 41 - sum(cuts)]:
            end = begin + length
            pieces.append(
                model(
                    ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                    past_key_values=cache, use_cache=True,
                ).logits
            )  # fmt: skip
            begin = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], wanted[real], atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 41


@torch.no_grad()
def test_every_decoded_token_has_the_logits_of_teacher_forcing(model):
    """Over several layouts: 16, 32, ... tokens."""
    plan, ids = plan_for(model, 2), prompts(2, 150)
    with applied(model, plan, cache="ragged"):
        wanted = model(ids, use_cache=False).logits
        cache = new_cache(model)
        found = [model(ids[:, :5], past_key_values=cache, use_cache=True).logits]
        for i in range(5, 150):
            found.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_several_turns(model):
    plan, turns = plan_for(model, 4), [prompts(2, 19, 1), prompts(2, 33, 2), prompts(2, 1, 3)]

    def talk(m, cache):
        ids = torch.empty(2, 0, dtype=torch.long)
        for turn in turns:
            ids = torch.cat([ids, turn], 1)
            mask = torch.ones_like(ids)  # transformers would take tokens equal to pad_token_id for padding
            ids = m.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=11, do_sample=False)
        return ids

    from transformers import DynamicCache

    with applied(model, plan, cache="masked"):
        wanted = talk(model, DynamicCache(config=model.config))
    with applied(model, plan, cache="ragged"):
        assert torch.equal(talk(model, new_cache(model)), wanted)
        assert torch.equal(talk(model, new_cache(model, reserve=500)), wanted)


@torch.no_grad()
def test_holes_in_the_mask(model):
    """Rows of unequal turns: padding in the middle. Positions count real tokens."""
    plan, ids = plan_for(model, 5), prompts(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 11:19], mask[1, :3], mask[1, 30:31] = 0, 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with applied(model, plan, cache="ragged"):
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache = new_cache(model)
        found = [
            model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
            for a, b in ((0, 15), (15, 30), (30, 31), (31, 32), (32, 40))
        ]
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], wanted[mask.bool()], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_shorter_than_the_sinks():
    model = tiny("Llama")
    plan = plan_for(model, rules=[HeadRule(50, 3, 0.0)])
    wanted, found = both(model, plan, lambda m: m.generate(prompts(1, 3), max_new_tokens=70, do_sample=False))
    assert torch.equal(found, wanted)
