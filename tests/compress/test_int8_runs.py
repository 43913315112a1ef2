"""--values int8 through the commands: what is evaluated, written, read back, reported and loaded is one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import same_bits
from exports import assert_same, plain
from families import save_family
from int8_cases import quantised, weights
from tiny import save_llama, save_texts
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import gossamer
from gossamer.cli.main import app
from gossamer.compress.convert import convert
from gossamer.compress.recipe import EvaluateStage, ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress, plan
from gossamer.compress.score import evaluate_model
from gossamer.compress.source import open_source

HALF = PruneStage(method="magnitude")
INT8 = "int8, group 128"


def recipe(*stages, form: str = "sparse", values: str = "int8") -> Recipe:
    return Recipe(stages=[*(stages or [HALF]), ExportStage(format=form, values=values)])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = save_llama(
        tmp_path_factory.mktemp("wide") / "model", dtype=torch.bfloat16, hidden_size=160, intermediate_size=136,
        num_hidden_layers=2,
    )  # fmt: skip
    save_texts(folder)
    return folder


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> tuple[Path, dict]:
    """(folder, report) of a run with calibration and evaluation."""
    out = tmp_path_factory.mktemp("run") / "out"
    words = ["compress", model, "-o", out, "--method", "wanda", "--values", "int8", "--nsamples", 4, "--seqlen", 32]
    words += ["--calibration", model / "calibration.txt", "--eval", model / "heldout.txt", "--eval-windows", 4]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert f"values: {INT8}; lossy" in done.stdout
    assert "as in the model" in done.stdout
    return out, json.loads((out / "report.json").read_text())


def test_the_perplexity_is_that_of_the_files(run, model):
    out, report = run
    after = report["evaluation"]["after"]["perplexity"]
    stage = EvaluateStage(data=str(model / "heldout.txt"), seqlen=32, windows=4)
    assert evaluate_model(out, stage)["perplexity"] == pytest.approx(after, rel=1e-12)
    assert evaluate_model(model, stage)["perplexity"] == pytest.approx(
        report["evaluation"]["before"]["perplexity"], rel=1e-12
    )


def test_rounding_is_what_numpy_does_to_the_run_without(run, model, tmp_path):
    """The same command without --values: the masks are equal, the kept weights the ones that were rounded."""
    out, report = run
    same = Recipe(**report["recipe"]).model_copy(update={"stages": (*Recipe(**report["recipe"]).stages[:1],)})
    floats = compress(model, tmp_path / "floats", same)
    first, second = open_source(tmp_path / "floats"), open_source(out)
    assert floats["values"] == "same"
    assert floats["masks"] == report["masks"]
    assert first.keys() == second.keys()
    for key in first.keys():
        wanted = first.read(key)
        if first.record(key) is not None:
            wanted = weights(*quantised(wanted, first.mask(key).to_bool()), wanted.dtype)
            assert not torch.equal(wanted, first.read(key))
        assert same_bits(second.read(key), wanted), key


def test_report_card_page_and_bytes(run):
    out, report = run
    size = (out / "model.sparse.safetensors").stat().st_size
    stored = plain(out, "model.sparse*")
    payload = sum(tensor.nbytes for tensor in stored.values())
    packed = sum(t.nbytes for n, t in stored.items() if n.endswith(("_bitmask", "_values", "_scales")))
    assert report["values"] == INT8
    assert report["recipe"]["stages"][-1]["values"] == "int8"
    assert report["bytes"]["files"] == {"model.sparse.safetensors": size}
    assert report["bytes"]["after"] == payload
    assert report["bytes"]["prunable_after"] == packed
    assert 0.32 < report["bytes"]["prunable_ratio"] < 0.34
    for name in ("README.md", "report.html"):
        assert INT8 in (out / name).read_text()
    assert "values: int8" in (out / "recipe.yaml").read_text()


def test_inspect(run):
    out, _ = run
    shown = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert "bfloat16 (int8, group 128)" in shown
    found = json.loads(CliRunner().invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert {row["values"] for row in found["layers"]} == {INT8}
    assert found["bytes"]["stored"] == sum(tensor.nbytes for tensor in plain(out, "model.sparse*").values())


@pytest.mark.parametrize(
    "family",
    ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)],
)
def test_all_forms_are_one_model(family, tmp_path):
    source = save_family(family, tmp_path / "model", dtype=torch.bfloat16)
    for form in ("sparse", "dense", "both"):
        planned = plan(source, tmp_path / form, recipe(form=form)).estimate
        report = compress(source, tmp_path / form, recipe(form=form))
        assert sum(planned.payload.values()) == report["bytes"]["after"]
        assert report["values"] == INT8
    assert plain(tmp_path / "both").keys() == plain(tmp_path / "dense").keys() | plain(tmp_path / "sparse").keys()
    for name, tensor in (plain(tmp_path / "sparse") | plain(tmp_path / "dense")).items():
        assert same_bits(plain(tmp_path / "both")[name], tensor), name
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["gossamer"]["format_version"] == 1
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert_same(gossamer.load(tmp_path / "sparse"), reference)
    assert_same(gossamer.load(tmp_path / "both"), reference)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", variant="sparse", dtype="auto"), reference)
    assert any(not same_bits(t, plain(source)[name]) for name, t in plain(tmp_path / "dense").items())


def test_compressing_an_int8_checkpoint_again(model, tmp_path):
    """Only the MLP is pruned again: the rest keeps its int8 values bit for bit, or becomes the floats behind them."""
    compress(model, tmp_path / "first", recipe())
    again = PruneStage(method="magnitude", sparsity=0.7, include=("mlp",))
    first = open_source(tmp_path / "first")
    for values in ("int8", "same"):
        planned = plan(tmp_path / "first", tmp_path / values, recipe(again, values=values)).estimate
        report = compress(tmp_path / "first", tmp_path / values, recipe(again, values=values))
        assert planned.payload["sparse"] == report["bytes"]["after"]
        found = open_source(tmp_path / values)
        for key, record in found.records().items():
            assert (record.int8 is not None) == (values == "int8")
            if "self_attn" in key:
                assert same_bits(found.read(key), first.read(key))
            if "self_attn" in key and values == "int8":
                assert same_bits(found.values(key), first.values(key))
                assert same_bits(found.scales(key), first.scales(key))


def test_a_masked_head_counts_in_the_evaluation(model, tmp_path):
    """The head was pruned by an earlier run; now it is only rounded, and the figure must say so."""
    pruned = PruneStage(method="magnitude", include=("lm_head", "mlp"))
    compress(model, tmp_path / "first", recipe(pruned, values="same"))
    stage = EvaluateStage(data=str(model / "heldout.txt"), seqlen=32, windows=3)
    report = compress(tmp_path / "first", tmp_path / "out", recipe(PruneStage(method="magnitude"), stage))
    assert open_source(tmp_path / "out").record("lm_head.weight").int8 is not None
    found = evaluate_model(tmp_path / "out", stage)
    assert report["evaluation"]["after"]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-12)


def test_convert_says_what_it_does(run, model, tmp_path):
    compress(model, tmp_path / "floats", recipe(values="same"))
    words = ["convert", str(tmp_path / "floats"), str(tmp_path / "int8"), "--to", "sparse", "--values", "int8"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("note: int8 values are lossy")
    report = json.loads((tmp_path / "int8" / "report.json").read_text())
    assert report["values"] == INT8
    assert any("after the perplexity above was measured" in note for note in report["notes"])
    stored = plain(tmp_path / "int8", "model.sparse*").items()
    packed = sum(t.nbytes for name, t in stored if name.endswith(("_bitmask", "_values", "_scales")))
    assert report["bytes"]["prunable_after"] == packed
    assert report["bytes"]["prunable_ratio"] == packed / report["bytes"]["prunable_before"]
    assert report["bytes"]["after"] < json.loads((tmp_path / "floats" / "report.json").read_text())["bytes"]["after"]
    convert(tmp_path / "int8", tmp_path / "dense", "dense")
    report = json.loads((tmp_path / "dense" / "report.json").read_text())
    assert report["values"] == INT8  # what the weights were rounded to, whichever form they are stored in
    done = CliRunner().invoke(app, [*words[:-1], "int4"])
    assert done.exit_code == 2
    assert "allowed: same, int8" in done.stderr
    done = CliRunner().invoke(app, ["convert", str(run[0]), str(tmp_path / "floats-again"), "--to", "sparse"])
    assert done.exit_code == 0
    assert done.stderr == ""


def test_dry_run_says_it(model, tmp_path):
    words = ["compress", str(model), "-o", str(tmp_path / "out"), "--method", "magnitude", "--no-eval", "--dry-run"]
    said = CliRunner().invoke(app, [*words, "--values", "int8"]).stdout
    assert "; values: int8, group 128 (lossy)" in said
    assert "lossy" not in CliRunner().invoke(app, words).stdout
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["values"] == "same"
