"""From block to block in one call: what a token brings along is looked at again where it is another one's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from decoding import cache_of, counted_ways, decode, halves, loaded
from headplans import plan_for

from gossamer.attention.filled import FilledCache
from gossamer.compress.blockturn import turn_of
from gossamer.compress.heads import apply
from gossamer.kernels.tier import current

pytestmark = pytest.mark.skipif(current() is None, reason="the compiled kernels are not there")


@pytest.fixture
def taken(monkeypatch):
    return counted_ways(monkeypatch)


@pytest.mark.parametrize("planned", [False, True])
def test_a_copied_cache_goes_its_own_way(planned, tmp_path, taken):
    """Copied in the middle of a sequence, deep or by pickle: what is stored in one is not in the other."""
    model = loaded("bitmask", tmp_path, torch.bfloat16)
    if planned:
        apply(model, plan_for(model))

    def step(cache, token):
        with torch.no_grad():
            return model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]

    def begun():
        cache = cache_of(model)
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
        return cache, [step(cache, 8), step(cache, 9)]

    ways = {"own": [11, 12, 13], "other": [14, 15, 16]}
    wanted = {}
    for name, tokens in ways.items():
        cache, _ = begun()
        wanted[name] = [step(cache, token) for token in tokens]
    copies = [copy.deepcopy] if planned else [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
    for made in copies:
        cache, _ = begun()
        assert turn_of(cache) is not None
        other = made(cache)
        assert turn_of(other) is None
        for i in range(3):
            assert torch.equal(step(other, ways["other"][i]), wanted["other"][i])
            assert torch.equal(step(cache, ways["own"][i]), wanted["own"][i])
    assert taken["modules"] == 0 < taken["whole"]


def test_what_a_block_is_given_is_looked_at_again_where_it_is_not_what_came_before(tmp_path, taken):
    """Blocks called by hand, the second with another tensor, rotation or mask than the first returned or had."""
    model = loaded("dense", tmp_path, torch.float32)
    first, second = model.model.layers[:2]
    decode(model)

    def two(change):
        cache = FilledCache(3, 8)
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, use_cache=True)
            x = model.model.embed_tokens(torch.tensor([[7]]))
            given = {"past_key_values": cache, "use_cache": True, "attention_mask": None}
            given["position_embeddings"] = model.model.rotary_emb(x, position_ids=torch.tensor([[2]]))
            y = first(x, **given)
            taken.clear()
            y, given = change(y, given)
            return second(y, **given)

    def turned_elsewhere(y, given):
        return y, given | {"position_embeddings": tuple(one.clone() for one in given["position_embeddings"])}

    same = two(lambda y, given: (y, given))
    assert taken["whole"] == 1
    assert torch.equal(two(lambda y, given: (y.clone(), given)), same)
    assert torch.equal(two(turned_elsewhere), same)
    assert taken["whole"] == 0
    other = two(lambda y, given: (2 * y, given))
    assert not torch.allclose(other, same)
    flat = torch.zeros(1, 1, 1, 3)
    torch.testing.assert_close(two(lambda y, given: (y, given | {"attention_mask": flat})), same, rtol=1e-5, atol=1e-5)
    assert halves(taken) == {"attention": 0, "feed": 1, "modules": 1}
    model.train()
    torch.testing.assert_close(two(lambda y, given: (y, given)), same, rtol=1e-5, atol=1e-5)
    assert not taken
