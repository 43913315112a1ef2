"""gossamer adapter: info, diff, compose, merge; swapping in place."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gossamer.cli.main import app
from gossamer.errors import CheckpointError
from gossamer.finetune.spiel.config import SpielConfig
from gossamer.finetune.spiel.delta import Delta, weighted_sum
from gossamer.finetune.spiel.layer import layers_of
from gossamer.finetune.spiel.swap import swap_adapter


def run(*words):
    return CliRunner().invoke(app, ["adapter", *map(str, words)])


def make(tiny, folder, seed, **config):
    """A saved adapter with random values; the model that it is on."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = get_peft_model(base, SpielConfig(seed=seed, target_modules=["q_proj", "up_proj"], density=0.1, **config))
    torch.manual_seed(seed)
    for layer in layers_of(model, "default"):
        layer.spiel_values["default"].data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def deltas(model):
    return {layer.name: layer.get_delta_weight("default") for layer in layers_of(model, "default")}


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return folder, make(tiny, folder / "a", 1), make(tiny, folder / "b", 2)


def test_info(pair):
    folder, model, _ = pair
    found = json.loads(run("info", folder / "a", "--json").stdout)
    assert found["method"] == "SPIEL"
    assert found["entries"] == sum(len(layer.spiel_values["default"]) for layer in layers_of(model, "default"))
    assert len(found["layers"]) == 6
    assert "bytes per entry" in run("info", folder / "a").stdout


def test_sums_and_differences(pair, tiny, tmp_path):
    folder, a, b = pair
    found = json.loads(run("diff", folder / "a", folder / "b", "-o", tmp_path / "difference", "--json").stdout)
    shared = sum(int(((x != 0) & (deltas(b)[n] != 0)).sum()) for n, x in deltas(a).items())
    assert found["shared"] == shared > 0
    assert found["distance"] == pytest.approx(
        sum(float((x - deltas(b)[n]).square().sum()) for n, x in deltas(a).items()) ** 0.5
    )
    assert run("compose", f"{folder / 'a'}:0.25", folder / "b", "-o", tmp_path / "sum").exit_code == 0
    for name, weights in (("difference", (1, -1)), ("sum", (0.25, 1))):
        made = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / name)
        for layer, delta in deltas(made).items():
            torch.testing.assert_close(delta, weights[0] * deltas(a)[layer] + weights[1] * deltas(b)[layer])
    same = json.loads(run("diff", folder / "a", folder / "a", "-o", tmp_path / "nothing", "--json").stdout)
    assert same["cosine"] == pytest.approx(1)
    assert json.loads(run("info", tmp_path / "nothing", "--json").stdout)["entries"] == 0


def test_wrong_arguments(pair, tiny, tmp_path):
    folder, _, _ = pair
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=1, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    for words, message in (
        (("info", tiny), "holds no adapter"),
        (("diff", folder / "a", tmp_path / "lora"), "sparse deltas are needed"),
        (("compose", f"{folder / 'a'}:x", "-o", tmp_path / "o"), "FOLDER:WEIGHT"),
        (("compose", folder / "a", "-o", folder / "b"), "is not empty"),
    ):
        done = run(*words)
        assert done.exit_code == 2
        assert message in done.output.replace("\n", " ") + done.stderr.replace("\n", " ")
    with pytest.raises(CheckpointError, match="2, 3 rows"):
        weighted_sum([(Delta(torch.zeros(0), torch.zeros(0), torch.zeros(n)), 1.0) for n in (2, 3)], "q")


def test_merge(pair, tiny, tmp_path):
    folder, a, _ = pair
    done = run("merge", tiny, folder / "a", "-o", tmp_path / "merged", "--format", "dense", "--quiet")
    assert done.exit_code == 0, done.output
    ids = torch.arange(10).view(1, 10)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(written(ids).logits, a(ids).logits)
    found = json.loads((tmp_path / "merged" / "report.json").read_text())
    stage = next(s for s in found["stages"] if s["stage"] == "merge")
    assert stage["lost"] == 0
    assert stage["entries"] == sum(len(layer.spiel_values["default"]) for layer in layers_of(a, "default"))


@pytest.mark.parametrize("merged", [False, True])
def test_swapping_in_place(pair, tiny, merged):
    folder, _, b = pair
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder / "a")
    ids = torch.arange(10).view(1, 10)
    if merged:
        model.merge_adapter()
    kept = [layer.spiel_values["default"] for layer in layers_of(model, "default")]
    swap_adapter(model, load_peft_weights(folder / "b"))
    torch.testing.assert_close(model(ids).logits, b(ids).logits)
    assert all(x is layer.spiel_values["default"] for x, layer in zip(kept, layers_of(model, "default"), strict=True))
    if merged:
        model.unmerge_adapter()
        base = AutoModelForCausalLM.from_pretrained(tiny)
        for layer in layers_of(model, "default"):
            assert torch.equal(layer.get_base_layer().weight, base.get_submodule(layer.name).weight)
    with pytest.raises(CheckpointError, match="no spiel_values"):
        swap_adapter(model, {})
