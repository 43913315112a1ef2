"""The methods of the table: what each trains, and a model that is ordinary again afterwards."""

from __future__ import annotations

import pytest
import torch
from families import save_family
from small import llama, masks_of, rows, zeros_of
from transformers import AutoModelForCausalLM

from gossamer.errors import RecipeError, TrainingError
from gossamer.finetune.biasnorm import bias_and_norm_names
from gossamer.finetune.methods import get_method, method_names
from gossamer.finetune.training import TrainingConfig, train

OPTIONS = {"rank": 2, "alpha": 4.0, "extras": True}
RECOVERY = ["masklora", "bias-norm", "full"]


@pytest.mark.parametrize("name", RECOVERY)
def test_what_moves_and_what_stays(tmp_path, name):
    model = llama()
    masks = masks_of(model)
    with torch.no_grad():
        for key, mask in masks.items():
            model.get_parameter(key).mul_(mask)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    attached = get_method(name).attach(model, masks, list(masks), OPTIONS, 0)
    train(model, TrainingConfig(folder=tmp_path, steps=10, batch=4, learning_rate=1e-2), attached.masks, data=rows())
    figures = attached.finish()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert before.keys() == dict(model.named_parameters()).keys()
    norms = {key for key in before if "norm" in key}
    expected = {"masklora": norms | masks.keys(), "bias-norm": norms, "full": before.keys()}[name]
    assert moved == set(expected)
    assert zeros_of(model, masks) == sum(int((~mask).sum()) for mask in masks.values())
    counts = {
        "masklora": sum(2 * sum(mask.shape) for mask in masks.values()) + sum(before[k].numel() for k in norms),
        "bias-norm": sum(before[key].numel() for key in norms),
        "full": sum(p.numel() for p in before.values()),
    }
    assert figures["trained"] == counts[name]


def test_masklora_alone(tmp_path):
    model = llama()
    masks = masks_of(model)
    attached = get_method("masklora").attach(model, masks, list(masks), OPTIONS | {"extras": False}, 0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.endswith((".up", ".down")) for name in trainable)
    attached.finish()


def test_biases_and_norms_of_another_family(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_family("gpt2", tmp_path))
    names = bias_and_norm_names(model)
    assert "transformer.ln_f.weight" in names
    assert "transformer.h.0.attn.c_attn.bias" in names
    assert not any("wte" in name or name.endswith("c_attn.weight") for name in names)
    assert all(model.get_parameter(name).dim() == 1 for name in names)


def test_a_model_without_either():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False))
    with pytest.raises(TrainingError, match="neither biases nor norms"):
        get_method("bias-norm").attach(model, {}, [], OPTIONS, 0)


@pytest.mark.parametrize("name", RECOVERY)
def test_shares_are_shares(name):
    shapes = [(64, 64)] * 7
    share = get_method(name).share(7 * 64 * 64, shapes, {"rank": 8})
    assert 0 < share <= 1
    assert (share == 1) == (name == "full")


def test_unknown():
    assert set(RECOVERY) <= set(method_names())
    with pytest.raises(RecipeError, match="'lora2' is unknown; allowed: masklora"):
        get_method("lora2")
