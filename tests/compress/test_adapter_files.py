"""Sums of adapters of other layers or other models, and damaged files: what is written can be loaded, or is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapter_command import deltas, run
from tiny import save_llama
from transformers import AutoModelForCausalLM

from gossamer.compress.adapterinfo import adapter_info
from gossamer.compress.adapters import combine
from gossamer.errors import CheckpointError
from gossamer.finetune.spiel.config import SpielConfig
from gossamer.finetune.spiel.layer import layers_of

LAYER = "base_model.model.model.layers.0.self_attn.q_proj.spiel_"


def make(base, folder, **config):
    model = get_peft_model(base, SpielConfig(density=0.1, **config))
    torch.manual_seed(3)
    for layer in layers_of(model, "default"):
        layer.spiel_values["default"].data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_adapters_of_other_layers_add_up(tiny, tmp_path):
    q = make(opened(tiny), tmp_path / "q", target_modules=["q_proj"])
    v = make(opened(tiny), tmp_path / "v", target_modules=["v_proj"])
    combine([(tmp_path / "q", 1.0), (tmp_path / "v", 0.5)], tmp_path / "both")
    made = deltas(PeftModel.from_pretrained(opened(tiny), tmp_path / "both"))
    for name, delta in deltas(q).items():
        torch.testing.assert_close(made.pop(name), delta)
    for name, delta in deltas(v).items():
        torch.testing.assert_close(made.pop(name), 0.5 * delta)
    assert made == {}
    other = save_llama(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        PeftModel.from_pretrained(opened(other), tmp_path / "both")


def test_adapters_of_other_models_do_not(tiny, tmp_path):
    changed = opened(tiny)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.01)
    make(opened(tiny), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    make(changed, tmp_path / "b", target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="trained on different weights"):
        combine([(tmp_path / "a", 1.0), (tmp_path / "b", 1.0)], tmp_path / "sum")
    make(opened(tiny), tmp_path / "c", target_modules=["o_proj"])
    path = tmp_path / "c" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "another"}))
    with pytest.raises(CheckpointError, match="of .*another"):
        combine([(tmp_path / "a", 1.0), (tmp_path / "c", 1.0)], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    with pytest.raises(CheckpointError, match="sum is not finite"):
        combine([(tmp_path / "a", 1e38), (tmp_path / "a", 1e39)], tmp_path / "sum")


DAMAGE = [
    (lambda t: t[LAYER + "values"][:1].fill_(float("nan")), "not finite"),
    (lambda t: t.update({LAYER + "columns": t[LAYER + "columns"].int().flip(0).to(torch.uint16)}), "ascending"),
    (lambda t: t.update({LAYER + "values": t[LAYER + "values"].int()}), "vectors of floats"),
    (lambda t: t.update({LAYER + "values": t[LAYER + "values"][:, None]}), "vectors of floats"),
    (lambda t: t.update({LAYER + "counts": t[LAYER + "counts"].sum()}), "vectors of floats"),
    (lambda t: t.update({LAYER + "values": t[LAYER + "values"][:-1]}), "values for"),
    (lambda t: t.pop(LAYER + "values"), "no spiel_values"),
    (lambda t: t.pop(LAYER + "counts"), "no spiel_counts"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_damage_is_seen_by_everything_that_reads(tiny, tmp_path, change, message):
    make(opened(tiny), tmp_path / "a", target_modules=["q_proj"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "adapter_model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file({key: t.contiguous() for key, t in stored.items()}, path)
    with pytest.raises(CheckpointError, match=message):
        adapter_info(tmp_path / "b")
    with pytest.raises(CheckpointError, match=message):
        combine([(tmp_path / "a", 1.0), (tmp_path / "b", 1.0)], tmp_path / "sum")


# ---- looking into adapters of peft's own methods ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 5}}, {"modules_to_save": ["norm"]}]
)
def test_info_of_a_lora_is_that_of_the_delta_it_stands_for(tiny, tmp_path, more):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **more)
    get_peft_model(opened(tiny), config).save_pretrained(tmp_path / "lora")
    found = adapter_info(tmp_path / "lora")
    merged = PeftModel.from_pretrained(opened(tiny), tmp_path / "lora").merge_and_unload()
    base = opened(tiny)
    for row in found["layers"]:
        one, other = (model.get_submodule(row["layer"]).weight.double() for model in (merged, base))
        assert row["norm"] == pytest.approx((one - other).norm().item(), rel=1e-4)
        assert (row["rank"], row["rows"], row["entries"]) == (2, len(one), 2 * sum(one.shape))
        assert row["bytes"] == 4 * row["entries"]
    assert len(found["layers"]) == 2 * base.config.num_hidden_layers
    assert found["entries"] == sum(row["entries"] for row in found["layers"])
    assert bool(found["other_tensors"]) == ("modules_to_save" in more)


def test_info_of_another_method_counts_what_is_stored(tiny, tmp_path):
    get_peft_model(opened(tiny), IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    found = adapter_info(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert (found["method"], found["layers"]) == ("IA3", [])
    assert found["entries"] == sum(t.numel() for t in stored.values())
    assert found["other_tensors"] == list(stored)


# ---- merging what does not fit ---------------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_found_while_planning(tiny, tmp_path):
    narrow = save_llama(tmp_path / "narrow", hidden_size=16, intermediate_size=24)
    lora = get_peft_model(opened(tiny), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    make(opened(tiny), tmp_path / "spiel", target_modules=["q_proj"])
    shutil.copytree(tmp_path / "lora", tmp_path / "unknown")
    path = tmp_path / "unknown" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "FUTURE"}))
    shutil.copytree(tmp_path / "lora", tmp_path / "renamed")
    path = tmp_path / "renamed" / "adapter_model.safetensors"
    save_file({k.replace("q_proj", "query"): t for k, t in load_file(path).items()}, path)
    for model, adapter, message in (
        (narrow, "lora", "32 x 32 for model.layers.0.self_attn.q_proj"),
        (narrow, "spiel", "32 x ? for model.layers.0.self_attn.q_proj"),
        (tiny, "unknown", "'FUTURE', which cannot be merged"),
        (tiny, "renamed", "query, which is no layer of"),
    ):
        done = run("merge", model, tmp_path / adapter, "-o", tmp_path / "out")
        text = " ".join((done.output + done.stderr).split())
        assert done.exit_code == 2, text
        assert message in text
        assert not list(tmp_path.glob("out*"))


def test_an_adapter_on_a_tied_head_is_refused_for_what_it_would_do(tmp_path):
    tied = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    model = get_peft_model(opened(tied), LoraConfig(r=2, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "lora")
    result = run("merge", str(tied), str(tmp_path / "lora"), "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "lm_head, whose weights are the embedding's" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
