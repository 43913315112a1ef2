"""Sparse deltas over pruned bases: patterns hold through training and merging."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from spiel_models import QUICK, Net, adapted, batch, fill, optimizer_of
from torch import nn

from gossamer.errors import ModelError
from gossamer.finetune.spiel.layer import layers_of
from gossamer.finetune.spiel.layout import encode
from gossamer.finetune.spiel.positions import to_csr
from gossamer.finetune.spiel.swap import swap_adapter
from gossamer.pruning.mask import Mask
from gossamer.pruning.pattern import NM, Unstructured


def pruned(pattern):
    net = Net(width=16)
    net.second = nn.Linear(17, 11, bias=False)
    net.first = nn.Linear(16, 17)
    masks = {}
    patterns = {"first": pattern, "second": Unstructured(0.6)}
    for name, one in patterns.items():
        layer = net.get_submodule(name)
        keep = one.mask(layer.weight.detach().abs())
        layer.weight.data.masked_fill_(~keep, 0.0)
        masks[f"{name}.weight"] = Mask.from_bool(keep, str(one))
    net.gossamer_masks = dict(masks)
    return net, masks


def train_pruned(model, steps=12):
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(step, width=16)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("policy", ["ag", "ma"])
def test_a_2_4_base_keeps_its_pattern_after_merging(tmp_path, policy):
    net, masks = pruned(NM(2, 4))
    base = copy.deepcopy(net)
    model = adapted(net, density=0.2, num_weights=None, policy=policy, **QUICK)
    train_pruned(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    for merged in (model.merge_and_unload(), loaded.merge_and_unload()):
        for name, mask in masks.items():
            weight = merged.get_parameter(name)
            gone = weight[~mask.to_bool()]
            assert torch.equal(gone.view(torch.int32), torch.zeros_like(gone).view(torch.int32))  # +0.0, bit for bit
            assert not torch.equal(weight, base.get_parameter(name))
        assert bool(((merged.first.weight != 0).view(17, 4, 4).sum(-1) <= 2).all())


def test_an_adapter_of_another_mask_is_not_merged(tmp_path):
    net, masks = pruned(NM(2, 4))
    model = adapted(net, density=0.2, num_weights=None)
    fill(model)
    layer = layers_of(model, "default")[0]
    layer.mask = Mask.from_bool(~layer.mask.to_bool(), "2:4")
    with pytest.raises(ModelError, match="lie on pruned weights"):
        model.merge_and_unload()


def test_only_pruned_positions():
    net, masks = pruned(NM(2, 4))
    model = adapted(net, density=0.2, num_weights=None, where="pruned", policy="ag", **QUICK)
    train_pruned(model)
    for layer in layers_of(model, "default"):
        assert not bool(masks[f"{layer.name}.weight"].to_bool().reshape(-1)[layer.flat("default")].any())


def test_seft_revives_and_prunes_to_the_exact_pattern():
    net, masks = pruned(NM(2, 4))
    base = copy.deepcopy(net)
    model = adapted(net, density=0.3, num_weights=None, where="seft", policy="ag", **QUICK)
    train_pruned(model)
    layer = layers_of(model, "default")[0]
    on_pruned = ~masks["first.weight"].to_bool().reshape(-1)[layer.flat("default")]
    assert bool(on_pruned.any())
    layer.spiel_values["default"].data[on_pruned] = 3.0  # far above any weight: these must survive
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, base.first.weight)
    merged = model.merge_and_unload()
    fresh = merged.spiel_masks
    assert fresh.keys() == masks.keys()
    for name, mask in fresh.items():
        assert mask.zeros == masks[name].zeros
        gone = merged.get_parameter(name)[~mask.to_bool()]
        assert torch.equal(gone.view(torch.int32), torch.zeros_like(gone).view(torch.int32))
    assert bool((fresh["first.weight"].to_bool().view(17, 4, 4).sum(-1) == 2).all())
    assert fresh["first.weight"] != masks["first.weight"]
    assert merged.gossamer_masks == fresh


def test_a_swap_that_cannot_be_merged_changes_nothing():
    """The first layer would take it; the second is what refuses."""
    net, masks = pruned(NM(2, 4))
    model = adapted(net, density=0.2, num_weights=None, policy="static").eval()
    fill(model)
    model.merge_adapter()
    x, _ = batch(0, width=16)
    weights = [layer.get_base_layer().weight.clone() for layer in layers_of(model, "default")]
    before, tensors = model(x), {}
    for layer, mask in zip(layers_of(model, "default"), masks.values(), strict=True):
        places = mask.to_bool().reshape(-1) if layer.name == "first" else ~mask.to_bool().reshape(-1)
        flat = places.nonzero().flatten()[: len(layer.spiel_values["default"])]
        csr = to_csr(flat, layer.out_features, layer.in_features)
        made = encode(torch.ones(len(flat)), *csr, layer.in_features, torch.float32)
        tensors |= {f"base_model.model.{layer.name}.{key}": tensor for key, tensor in made.items()}
    with pytest.raises(ModelError):
        swap_adapter(model, tensors)
    assert torch.equal(model(x), before)
    for layer, weight in zip(layers_of(model, "default"), weights, strict=True):
        assert torch.equal(layer.get_base_layer().weight, weight)
    model.unmerge_adapter()
    for layer in layers_of(model, "default"):
        assert not bool(layer.get_base_layer().weight[~masks[f"{layer.name}.weight"].to_bool()].any())
