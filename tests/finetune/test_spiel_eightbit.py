"""Adam's moments of sparse deltas in 8 bits: codes, positions that move with them, resuming, memory."""

from __future__ import annotations

import pytest
import torch
from spiel_models import adapted, loss_of
from test_spiel_training import QUICK, optimizer_of, same, state, train

from gossamer.errors import RecipeError
from gossamer.finetune.spiel.eightbit import decode, encode
from gossamer.finetune.spiel.layer import layers_of


@pytest.mark.parametrize("count", [1, 255, 257, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_codes(count, signed):
    """Within 1.6 % of their block's largest value, next to nothing where they are 0, one scale per 256."""
    torch.manual_seed(count)
    values = torch.randn(count) * 10.0 ** torch.randint(-6, 3, (count,))
    values = values if signed else values.abs()
    values[::7] = 0.0
    codes, scales = encode(values, signed=signed)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (count,), (-(-count // 256),))
    found = decode(codes, scales, signed=signed)
    largest = scales.repeat_interleave(256)[:count]
    assert bool((found[::7].abs() <= 3e-5 * largest[::7]).all())  # on CPUs 0 may become the code beside it
    assert float(((found - values).abs() / largest.clamp(min=1e-30)).max()) < 0.016
    if not signed:
        assert float(found.min()) >= 0


@pytest.mark.parametrize("policy", ["static", "ag"])
def test_it_learns_what_float32_learns(policy):
    found = {}
    for eight_bit in (False, True):
        model = adapted(policy=policy, **QUICK)
        before = sum(float(loss_of(model, i).detach()) for i in range(20))
        optimizer = optimizer_of(model, eight_bit=eight_bit)
        train(model, optimizer, 0, 40)
        found[eight_bit] = sum(float(loss_of(model, i).detach()) for i in range(20))
        assert found[eight_bit] < before
        counts = [len(values) for _, values in state(model)]
        assert sum(counts) == 60
        assert all(bool((flat.diff() > 0).all()) for flat, _ in state(model))
        if policy == "ag":
            assert optimizer.history[0]["replaced"] == 60
    assert found[True] == pytest.approx(found[False], rel=0.05)
    assert found[True] != found[False]


@pytest.mark.parametrize("stop", [3, 5, 6])  # before, in and at the end of a window
def test_resuming_is_exact(tmp_path, stop):
    config = {"policy": "ag", **QUICK}
    whole = adapted(**config)
    train(whole, optimizer_of(whole, eight_bit=True), 0, 11)
    model = adapted(**config)
    optimizer = optimizer_of(model, eight_bit=True)
    train(model, optimizer, 0, stop)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = adapted(**config)
    optimizer = optimizer_of(again, eight_bit=True)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, optimizer, stop, 11)
    assert same(state(again), state(whole))


def test_bytes_per_entry():
    """Two codes and a birth of 4 bytes, and two scales per 256 entries."""
    model = adapted(policy="static", num_weights=300)
    optimizer = optimizer_of(model, eight_bit=True)
    train(model, optimizer, 0, 2)
    for layer in layers_of(model, "default"):
        values = layer.spiel_values["default"]
        held = sum(tensor.nbytes for tensor in optimizer.state[values].values())
        assert held == 6 * len(values) + 8 * -(-len(values) // 256)


def test_sm3_has_no_moments_to_hold():
    with pytest.raises(RecipeError, match="no moments per entry"):
        optimizer_of(adapted(policy="ma", **QUICK), eight_bit=True)
