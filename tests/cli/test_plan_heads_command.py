"""gossamer plan-heads: options become the recipe, a run prints the plan, and the checkpoint runs by it."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from typer.testing import CliRunner

import gossamer
from gossamer.cli.main import app
from gossamer.compress.stage_recipes.heads import HeadsStage

SMALL = ["--lengths", "16,32", "--block", "4", "--nsamples", "2", "--validation-samples", "2", "--probe", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_llama(folder)
    tiny.save_texts(folder)
    return folder


def run(*words):
    return CliRunner().invoke(app, ["plan-heads", *map(str, words)])


def test_the_plan_is_printed_saved_and_run(folder, tmp_path):
    out = tmp_path / "out"
    done = run(folder, "-o", out, "--calibration", folder / "calibration.txt", *SMALL)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    for words in ("KV bytes", "Density of every layer", "KL to dense", "above the LP bound", "every token counted"):
        assert words in said
    assert (out / "model.safetensors").exists()  # dense, as the model was
    model = gossamer.load(out)
    assert model.gossamer_heads.plan.density(32) <= 0.5 + 1e-9
    ids = torch.arange(2, 42)[None]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 44)


def test_json_and_dry_run(folder, tmp_path):
    words = [folder, "-o", tmp_path / "out", "--calibration", folder / "calibration.txt", *SMALL, "--method", "uniform"]
    dry = run(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "no weight changes" in dry.output
    assert not (tmp_path / "out").exists()
    done = run(*words, "--json", "-q")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["stages"][0]["plan"]["made"]["method"] == "uniform"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "16,x"], "--lengths '16,x' is not a list of whole numbers"),
        (["--density", "2"], "density must be in (0, 1], got 2"),
        (["--method", "best"], "method"),
        (["--lengths", "16,512"], "--lengths 512 is beyond the model's 64 positions"),
    ],
)
def test_bad_input_ends_in_one_line(folder, tmp_path, words, message):
    done = run(folder, "-o", tmp_path / "out", "--calibration", folder / "calibration.txt", *words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_the_defaults_on_the_help_page_are_those_of_the_recipe():
    page = (tiny.Path(__file__).parents[2] / "cli" / "plan_heads.py").read_text()
    fields = HeadsStage.model_fields
    for name in ("method", "density", "loss", "solver", "candidates", "prefill", "nsamples", "answers", "probe"):
        assert re.search(rf"\[default: {re.escape(format(fields[name].default, ''))}\]", page), name
