"""Layers that bitsandbytes quantised, on the CPU: evaluation in between costs no gradient and no weight."""

from __future__ import annotations

import copy
import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from spiel_models import adapted, fill
from torch import nn

from gossamer.errors import ModelError
from gossamer.finetune.quantised import (
    SAMPLE,
    dequantised,
    is_4bit,
    is_quantised,
    keep_unpacked,
    origin_of,
    plain,
    quantise,
    sample_of,
)
from gossamer.finetune.spiel.config import SpielConfig
from gossamer.finetune.spiel.layer import layers_of


def four_bit(kind: str = "nf4", rows: int = 64, cols: int = 128) -> tuple[bnb.nn.Linear4bit, torch.Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(cols, rows, bias=False)
    layer = bnb.nn.Linear4bit(cols, rows, bias=False, quant_type=kind, compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu"), plain.weight.detach()


def gradient(layer: nn.Module) -> torch.Tensor | None:
    x = torch.ones(3, layer.in_features, requires_grad=True)
    y = layer.train()(x)
    if not y.requires_grad:
        return None
    y.square().sum().backward()
    return x.grad


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_evaluation_then_training(kind):
    layer, _ = four_bit(kind)
    wanted, weight = gradient(layer), dequantised(layer)
    assert keep_unpacked(nn.Sequential(layer)) == 1
    with torch.no_grad():
        layer.eval()(torch.randn(1, 128))
    assert torch.equal(dequantised(layer), weight)
    assert torch.equal(gradient(layer), wanted)


def test_what_was_repacked_is_packed_back():
    """Without the guard this processor's evaluation breaks training; where it does not, there is nothing to undo."""
    layer, _ = four_bit()
    wanted, weight, packed = gradient(layer), dequantised(layer), layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(1, 128))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack on this processor")
    assert not torch.equal(layer.weight.data.flatten(), packed.flatten())
    keep_unpacked(layer)
    torch.testing.assert_close(dequantised(layer), weight, rtol=2**-8, atol=0)  # its scales are bfloat16 now
    torch.testing.assert_close(gradient(layer), wanted, rtol=0.05, atol=0.02 * float(wanted.abs().max()))


def test_the_matrix_that_it_stands_for():
    layer, weight = four_bit()
    error = (dequantised(layer) - weight).norm() / weight.norm()
    assert 0.01 < float(error) < 0.15
    torch.testing.assert_close(layer(torch.eye(128)).t(), dequantised(layer))
    eight = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
    eight.load_state_dict({"weight": weight})
    eight = eight.to("cpu")
    error = (dequantised(eight) - weight).norm() / weight.norm()
    assert 0.0001 < float(error) < 0.01


def test_others_are_left_alone():
    plain = nn.Linear(3, 2)
    assert not is_4bit(plain)
    assert not is_quantised(plain)
    assert keep_unpacked(nn.Sequential(plain)) == 0
    with pytest.raises(ModelError, match="not a layer that bitsandbytes"):
        dequantised(plain)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise_keeps_zeros_and_nothing_of_the_old_weight(kind, dtype):
    """Rows and blocks that are all zero too; what is remembered of the weight is no view of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 96, dtype=dtype))
    keep = torch.rand(96, 200) > 0.5
    keep[10:40] = False
    net[0].weight.data.mul_(keep)
    weight, alive = net[0].weight.detach().float().clone(), weakref.ref(net[0].weight.untyped_storage())
    bias = net[0].bias
    quantise(net, ["0"], kind, dtype)
    gc.collect()
    assert alive() is None
    assert is_quantised(net[0])
    assert net[0].bias is bias
    found = plain(net[0])
    assert not found.weight[~keep].any()
    assert float((found.weight - weight).norm() / weight.norm()) < (0.01 if kind == "int8" else 0.15)
    sample = origin_of(net[0]).sample
    assert torch.equal(sample, sample_of(weight))
    assert sample.untyped_storage().nbytes() == 2 * len(sample) <= 2 * SAMPLE
    x = torch.randn(3, 200, dtype=dtype)
    wanted = x.float() @ found.weight.t() + bias.float()
    torch.testing.assert_close(net.train()(x).float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapted_layers_train_after_evaluation_and_merge_in_a_bfloat16_model(kind):
    """Whoever wraps by peft need not know that bitsandbytes repacks; what is dequantised runs among 16-bit layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 64)).bfloat16()
    quantise(net, ["0", "2"], kind, torch.bfloat16)
    for layer in net:
        if is_4bit(layer):
            layer.support_avx512bf16_for_cpu = True  # as transformers loads it
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    made = {}
    for evaluated in (False, True):
        model = get_peft_model(copy.deepcopy(net), SpielConfig(target_modules=["0", "2"], num_weights=80))
        fill(model)
        if evaluated:
            with torch.no_grad():
                model.eval()(x)
        model.train()(x).float().square().sum().backward()
        made[evaluated] = [layer.spiel_values["default"].grad.clone() for layer in layers_of(model, "default")]
    for once, again in zip(made[False], made[True], strict=True):
        torch.testing.assert_close(once, again, rtol=0.02, atol=0.02 * float(once.abs().max()))
    with torch.no_grad():
        wanted = model.eval()(x)
        for layer in layers_of(model, "default"):
            layer.dequantise()
        found = model.merge_and_unload()(x)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))


def test_deltas_stay_float32_in_a_model_that_is_cast():
    model = adapted(num_weights=60)
    fill(model)
    before = [layer.spiel_values["default"].detach().clone() for layer in layers_of(model, "default")]
    model.to(torch.bfloat16)
    values = [layer.spiel_values["default"] for layer in layers_of(model, "default")]
    assert all(torch.equal(now, then) for now, then in zip(values, before, strict=True))
    x = torch.randn(3, 13, dtype=torch.bfloat16)
    model.train()(x).float().sum().backward()
    assert all(value.grad is not None and value.grad.dtype is torch.float32 for value in values)
