"""`finetune` with sparse deltas and LoRA as a stage of a recipe: merged weights, the adapter beside them, masks."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from tiny import report, tensors
from transformers import AutoModelForCausalLM

from gossamer.compress.load import load
from gossamer.compress.recipe import ExportStage, FinetuneStage, PruneStage, Recipe
from gossamer.compress.run import compress
from gossamer.errors import RecipeError

SHORT = {"steps": 6, "batch": 4, "seqlen": 16, "interval": 2, "window": 1, "log_every": 1, "save_every": 0}


def finetune(tiny, **fields):
    return FinetuneStage(data=str(tiny / "calibration.txt"), **(SHORT | fields))


def only(fields, method):
    moving = {"interval", "window"}
    return {k: v for k, v in fields.items() if method.startswith("spiel") or k not in moving}


@pytest.mark.parametrize("method", ["spiel-ag", "spiel-ma", "static", "lora"])
def test_a_dense_model(tiny, tmp_path, method):
    extra = {"rank": 2} if method == "lora" else {"rank_equivalent": 2, "adapter_dtype": "float32"}
    stage = FinetuneStage(
        data=str(tiny / "calibration.txt"), method=method, learning_rate=0.01, **only(SHORT, method), **extra
    )
    out = tmp_path / "out"
    compress(tiny, out, Recipe(stages=(stage, ExportStage(format="dense"))))
    found = next(s for s in report(out)["stages"] if s["stage"] == "finetune")
    shapes = [t.shape for k, t in tensors(tiny).items() if "proj" in k]
    assert found["trained"] == 2 * sum(sum(shape) for shape in shapes)
    assert found["adapted"] == len(shapes) == 21
    assert found["heldout"]["after"] < found["heldout"]["before"]
    if method in ("spiel-ag", "spiel-ma"):
        assert [r["update"] for r in found["reselections"]] == [1, 3, 5]
        assert "churn" in (out / "gossamer" / "metrics.jsonl").read_text()
    folder = out / "gossamer" / "adapter-0"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny.name
    base = AutoModelForCausalLM.from_pretrained(tiny)
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    written = AutoModelForCausalLM.from_pretrained(out)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, written.get_parameter(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("pattern", "where"), [("2:4", None), ("2:4", "seft")])
def test_after_pruning_zeros_and_patterns_hold(tiny, tmp_path, pattern, where):
    prune = PruneStage(method="magnitude", pattern=pattern)
    compress(tiny, tmp_path / "pruned", Recipe(stages=(prune, ExportStage())))
    stage = finetune(tiny, method="spiel-ag", density=0.1, learning_rate=0.03, where=where)
    compress(tiny, tmp_path / "out", Recipe(stages=(prune, stage, ExportStage())))
    before, after = load(tmp_path / "pruned", packed=False), load(tmp_path / "out", packed=False)
    moved = 0
    for name, mask in before.gossamer_masks.items():
        now = after.gossamer_masks[name]
        assert now.zeros == mask.zeros
        assert now.pattern == mask.pattern
        moved += int((now.to_bool() != mask.to_bool()).sum())
        weight = after.get_parameter(name)
        assert not bool(weight[~now.to_bool()].any())
        if pattern == "2:4":
            assert bool(((weight != 0).view(weight.shape[0], -1, 4).sum(-1) <= 2).all())
        assert not torch.equal(weight, before.get_parameter(name))
    assert (moved > 0) == (where == "seft")


def test_before_pruning(tiny, tmp_path):
    stages = (
        FinetuneStage(data=str(tiny / "calibration.txt"), method="static", density=0.05, **only(SHORT, "static")),
        PruneStage(method="magnitude", pattern="0.5"),
        ExportStage(),
    )
    compress(tiny, tmp_path / "out", Recipe(stages=stages))
    model = load(tmp_path / "out", packed=False)
    assert all(mask.zeros == mask.to_bool().numel() // 2 for mask in model.gossamer_masks.values())
    assert (tmp_path / "out" / "gossamer" / "adapter-0" / "adapter_model.safetensors").exists()


def test_lora_on_a_pruned_model_is_refused(tiny, tmp_path):
    stages = (
        PruneStage(method="magnitude"),
        FinetuneStage(data=str(tiny / "calibration.txt"), method="lora", steps=1, batch=1, seqlen=16),
        ExportStage(),
    )
    with pytest.raises(RecipeError, match="cannot keep the zeros"):
        compress(tiny, tmp_path / "out", Recipe(stages=stages))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 1.5}, "density must be in"),
        ({"density": 0.1, "num_weights": 4}, "both given"),
        ({"window": 30}, "window of 30"),
        ({"allocation": "global", "selection": "random"}, "has none"),
    ],
)
def test_fields_that_cannot_work(fields, message):
    with pytest.raises(Exception, match=message):
        FinetuneStage(method="spiel-ag", **fields)
