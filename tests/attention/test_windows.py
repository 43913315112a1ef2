"""A plan as windows per layer: transformers' own sliding windows give the same logits; what does not fit is named."""

from __future__ import annotations

import json

import pytest
import torch
from headplans import plan_for, tiny
from typer.testing import CliRunner

from gossamer.attention.plan import FULL, HeadPlan, HeadRule
from gossamer.attention.windows import engine_settings, layer_windows
from gossamer.cli.main import app
from gossamer.compress.heads import apply
from gossamer.errors import RecipeError


def tied(*rules: HeadRule) -> HeadPlan:
    return HeadPlan("qwen2", 6, 8, 4, (64,), 512, tuple((rule, rule) for rule in rules))


@torch.no_grad()
def test_transformers_windows_give_the_same_logits():
    model = tiny("Qwen2")
    plan = tied(HeadRule(0, 11, 0.0), FULL, HeadRule(0, 11, 0.0))
    ids = torch.randint(2, 97, (2, 60))
    dense = model(ids).logits
    wanted = apply(model, plan)(ids).logits
    native = tiny("Qwen2", **engine_settings(plan, "transformers"))(ids).logits
    torch.testing.assert_close(native, wanted, atol=1e-5, rtol=1e-5)
    assert (native - dense).abs().max() > 1e-2


def test_windows_count_as_the_engines_do():
    plan = tied(HeadRule(4, 20, 0.0), FULL, HeadRule(4, 3, 0.0))
    assert layer_windows(plan) == ((16, 4), (None, 0), (4, 4))
    assert engine_settings(plan, "tensorrt-llm") == {"max_attention_window": [20, 512, 8], "sink_token_length": 4}


@pytest.mark.parametrize(
    ("plan", "engine", "message"),
    [
        (
            HeadPlan("qwen2", 6, 8, 4, (64,), 512, ((FULL, FULL), (FULL, HeadRule(0, 9, 0.0)))),
            "transformers",
            "layer 1",
        ),
        (tied(FULL, HeadRule(0, 9, 0.5)), "tensorrt-llm", r"layer 1 .* share of the length \(0.5\)"),
        (tied(HeadRule(2, 9, 0.0)), "transformers", "keep 2 sinks"),
        (tied(HeadRule(0, 9, 0.0), HeadRule(0, 12, 0.0)), "transformers", "windows of 9, 12 tokens"),
        (tied(HeadRule(2, 9, 0.0), HeadRule(3, 9, 0.0)), "tensorrt-llm", "keep 2, 3 sinks"),
        (tied(FULL), "vllm", "allowed: transformers, tensorrt-llm"),
    ],
)
def test_what_does_not_fit(plan, engine, message):
    with pytest.raises(RecipeError, match=message):
        engine_settings(plan, engine)


def test_the_command(tmp_path):
    model = tiny("Qwen2")
    run = lambda *arguments: CliRunner().invoke(app, ["windows", str(tmp_path), *arguments])
    model.save_pretrained(tmp_path)
    assert "has no head plan" in run().stderr
    config = json.loads((tmp_path / "config.json").read_text())
    config["gossamer"] = {"heads": tied(HeadRule(0, 9, 0.0), FULL, FULL).to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert json.loads(run().stdout)["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert json.loads(run("--engine", "tensorrt-llm").stdout)["max_attention_window"] == [9, 512, 512]
    config["gossamer"] = {"heads": plan_for(model).to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    answer = run()
    assert answer.exit_code == 2
    assert "different parts of the past" in answer.stderr
