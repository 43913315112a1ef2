"""The positions that sparse deltas begin with, against dense gradients."""

from __future__ import annotations

import pytest
import torch
from spiel_models import Net, adapted, loss_of, optimizer_of, train

from gossamer.errors import RecipeError
from gossamer.finetune.spiel.layer import layers_of
from gossamer.finetune.spiel.policy import filled, top_product
from gossamer.finetune.spiel.select import global_counts, selecting
from gossamer.pruning.mask import Mask


@pytest.mark.parametrize("selection", ["gradient", "snip", "fisher"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_selection_by_data(selection, allocation):
    model = adapted(policy="static", selection=selection, allocation=allocation, num_weights=60)
    layers = layers_of(model, "default")
    shares = [len(layer.spiel_values["default"]) for layer in layers]
    scores = [torch.zeros(layer.out_features * layer.in_features) for layer in layers]
    twin = Net()
    weights = [twin.first.weight, twin.second.weight]
    loss_of(twin, 0).backward()
    for score, weight in zip(scores, weights, strict=True):
        gradient = weight.grad.reshape(-1)
        score.copy_(
            {"gradient": gradient, "snip": gradient * weight.detach().reshape(-1), "fisher": gradient**2}[selection]
        )
    with selecting(model):
        loss_of(model, 0).backward()
    model.zero_grad()
    found = [layer.flat("default") for layer in layers]
    if allocation == "uniform":
        for flat, score, k in zip(found, scores, shares, strict=True):
            assert torch.equal(flat, score.abs().topk(k).indices.sort().values)
    else:
        assert sum(len(flat) for flat in found) == 60
        chosen = torch.cat([score.abs()[flat] for score, flat in zip(scores, found, strict=True)])
        least = [int(0.1 * k) for k in shares]
        assert all(len(f) >= m for f, m in zip(found, least, strict=True))
        everything = torch.cat([s.abs() for s in scores]).topk(60).values
        torch.testing.assert_close(chosen.sort().values, everything.sort().values)
    assert not layers[0].watches
    train(model, optimizer_of(model), 0, 2)


def test_global_counts_have_a_floor_and_a_ceiling():
    scores = [torch.full((100,), 9.0), torch.full((100,), 1.0), torch.full((100,), 2.0)]
    assert global_counts(scores, [20, 20, 20], [100, 100, 100]) == [56, 2, 2]
    assert sum(global_counts(scores, [10, 40, 10], [100, 100, 100])) == 60
    assert global_counts(scores, [10, 40, 10], [100, 100, 100])[0] == 40


def test_selection_by_magnitude():
    model = adapted(policy="static", selection="magnitude")
    for layer in layers_of(model, "default"):
        weight = layer.get_base_layer().weight.detach().abs().reshape(-1)
        want = weight.topk(len(layer.spiel_values["default"])).indices.sort().values
        assert torch.equal(layer.flat("default"), want)
    with pytest.raises(RecipeError, match="looks at no data"):
        with selecting(model):
            pass


def test_top_product_against_the_outer_product():
    source = torch.Generator().manual_seed(1)
    rows, cols = torch.rand(23, generator=source), torch.rand(31, generator=source)
    taken = torch.randperm(23 * 31, generator=source)[:50].sort().values
    allowed = Mask.from_bool(torch.rand(23, 31, generator=source) < 0.7, "0.3")
    outer = torch.outer(rows, cols).reshape(-1).masked_fill(~allowed.to_bool().reshape(-1), 0.0)
    outer[taken] = 0.0
    assert torch.equal(top_product(rows, cols, 40, taken, allowed), outer.topk(40).indices.sort().values)
    assert filled(torch.tensor([2.0, 0.0, 4.0]), torch.tensor([1.0, 5.0, 2.0])).tolist() == [2.0, 10.0, 4.0]


@pytest.mark.parametrize("selection", ["gradient", "snip", "fisher"])
def test_every_batch_counts(selection):
    """Gradients are cleared between the batches, as whoever scores does."""
    model = adapted(policy="static", selection=selection, num_weights=60)
    layers, twin = layers_of(model, "default"), Net()
    shares = [len(layer.spiel_values["default"]) for layer in layers]
    weights = [twin.first.weight, twin.second.weight]
    sums = [torch.zeros_like(weight) for weight in weights]
    with selecting(model):
        for number in range(4):
            loss_of(model, number).backward()
            model.zero_grad()
            loss_of(twin, number).backward()
            for total, weight in zip(sums, weights, strict=True):
                gradient = weight.grad.detach()
                total += gradient**2 if selection == "fisher" else gradient
            twin.zero_grad()
    overlap = 0
    for layer, total, weight, k in zip(layers, sums, weights, shares, strict=True):
        score = (total * weight.detach() if selection == "snip" else total).abs().reshape(-1)
        overlap += int(torch.isin(layer.flat("default"), score.topk(k).indices).sum())
    assert overlap >= 0.9 * sum(shares)  # a sketch: what was let go before it mattered is lost
