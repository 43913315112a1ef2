"""The cache of our decode loop: what it holds is what transformers' growing cache holds."""

from __future__ import annotations

import pytest
import torch
from headplans import tiny
from transformers import DynamicCache

from gossamer.attention.filled import FilledCache, every_key


def states(tokens, seed, batch=2, heads=3, width=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("capacity", [1, 5, 64])
def test_it_holds_what_came(capacity):
    cache, usual = FilledCache(2, capacity), DynamicCache()
    for turn, tokens in enumerate((3, 1, 1, 4, 1)):
        for layer in range(2):
            key, value = states(tokens, 10 * turn + layer)
            for found, wanted in zip(cache.update(key, value, layer), usual.update(key, value, layer), strict=True):
                assert torch.equal(found, wanted)
    assert cache.get_seq_length() == usual.get_seq_length() == 10
    assert cache.layers[0].get_mask_sizes(3) == (13, 0)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_the_place_of_a_token_is_where_update_would_put_it():
    cache = FilledCache(1, 4)
    layer = cache.layers[0]
    assert layer.place_one() is None  # nothing is known of its shape
    cache.update(*states(4, 0), 0)
    for step in range(3):  # the first one finds it full
        key, value = states(1, 1 + step)
        place = layer.place_one()
        assert layer.seen == 4 + step
        assert not place.slots.unique().numel() < 6
        place.rows.keys[place.slots] = key[:, :, 0]
        place.rows.values[place.slots] = value[:, :, 0]
        layer.placed_one()
        assert torch.equal(layer.keys[:, :, layer.seen - 1], key[:, :, 0])
        assert torch.equal(layer.values[:, :, layer.seen - 1], value[:, :, 0])
        first, count = place.ranges[1, 2, :2].tolist()
        assert torch.equal(place.rows.keys[first : first + count], layer.keys[1, 2, : layer.seen])
    assert every_key(2, 3, 5, 7)[..., 0].tolist() == [[0, 7, 14], [21, 28, 35]]


def test_keys_and_values_of_different_widths_have_no_place():
    cache = FilledCache(1, 4)
    cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 6), 0)
    assert cache.layers[0].place_one() is None


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "OPT"])
def test_a_model_runs_on_it(kind):
    model = tiny(kind)
    given = torch.randint(2, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(given).logits
        cache, found = FilledCache(model.config.num_hidden_layers, 6), []
        for begin, end in ((0, 5), (5, 9), *((i, i + 1) for i in range(9, 20))):
            found.append(model(given[:, begin:end], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-4)
