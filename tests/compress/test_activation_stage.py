"""The activation stage in whole runs: command and recipe, order with pruning, resume, several processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import Launcher
from tiny import report
from transformers import AutoModelForCausalLM

from gossamer.compress import plan
from gossamer.compress.activation.file import read_policy
from gossamer.compress.format import METADATA_KEY
from gossamer.compress.plan import calibration_dtype
from gossamer.compress.recipe import ActivationStage, Machine, Recipe, load_recipe
from gossamer.compress.run import compress
from gossamer.compress.stages import activation
from gossamer.errors import RecipeError

SIZES = ("--nsamples", "6", "--seqlen", "32", "--eval-windows", "3")
FILE = "gossamer/activation.safetensors"


def words(tiny: Path, out: Path, *more: str | Path) -> list[str | Path]:
    texts = ["--calibration", tiny / "calibration.txt", "--eval", tiny / "heldout.txt"]
    return ["compress", tiny, "-o", out, *texts, *SIZES, *more]


def policy_of(out: Path):
    return read_policy(out, json.loads((out / "config.json").read_text())[METADATA_KEY]["activation"])


def test_alone_it_prunes_nothing(launcher: Launcher, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = launcher.run(
        *words(tiny, out, "--activation", "auto", "--activation-sparsity", "0.4", "--nsamples", "40", "--json")
    )
    assert done.returncode == 0, done.stderr
    found = report(out)
    assert [stage["stage"] for stage in found["stages"]] == ["activation", "evaluate"]
    assert found["sparsity"]["zeros"] == 0
    assert found["evaluation"]["kl"] == pytest.approx(0, abs=1e-9)
    skipped = found["evaluation"]["activation"]
    assert skipped["sparsity"] == pytest.approx(0.4, abs=0.03)
    assert skipped["after"]["perplexity"] != skipped["before"]["perplexity"]
    policy = policy_of(out)
    assert policy.method == "auto"
    assert policy.facts["calibrated"] == pytest.approx(0.4, abs=0.01)
    assert policy.sites["model.layers.0.self_attn.v_proj"] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("first", ["prune", "activation"])
def test_with_pruning_it_is_calibrated_on_the_pruned_weights(first: str, tiny: Path, tmp_path: Path) -> None:
    """As first or second stage: it runs after the last change of the weights, so both give the same files."""
    stages = [
        {"stage": "prune", "method": "magnitude", "sparsity": 0.5},
        {"stage": "activation", "method": "threshold", "sparsity": 0.3, "calibration": str(tiny / "calibration.txt"),
         "nsamples": 4, "seqlen": 32, "search": False},
    ]  # fmt: skip
    if first == "activation":
        stages.reverse()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}))
    found = compress(tiny, tmp_path / "out", load_recipe(path))
    assert [stage["stage"] for stage in found["stages"]] == ["prune", "activation"]
    assert found["sparsity"]["prunable"] == pytest.approx(0.5, abs=0.01)
    threshold = policy_of(tmp_path / "out").linears["model.layers.2.mlp.down_proj"].threshold
    dense = compress(tiny, tmp_path / "dense", load_recipe(_only_activation(path, stages)))
    assert dense["sparsity"]["zeros"] == 0
    other = policy_of(tmp_path / "dense").linears["model.layers.2.mlp.down_proj"].threshold
    assert not torch.equal(threshold, other)


def _only_activation(path: Path, stages: list[dict]) -> Path:
    path.write_text(yaml.safe_dump({"stages": [s for s in stages if s["stage"] == "activation"]}))
    return path


def test_a_killed_run_goes_on_to_the_same_policy(launcher: Launcher, tiny: Path, tmp_path: Path) -> None:
    more = ("--activation", "auto", "--no-eval", "--activation-sparsity", "0.4")
    base = [
        w
        for w in words(tiny, tmp_path / "whole", *more)
        if w not in ("--eval", tiny / "heldout.txt", "--eval-windows", "3")
    ]
    assert launcher.run(*base).returncode == 0
    cut = [tmp_path / "cut" if w == tmp_path / "whole" else w for w in base]
    stop = launcher.run(*cut, env={"GOSSAMER_FAILPOINT": "journal:4"})
    assert stop.returncode != 0
    assert (tmp_path / "cut.partial").exists()
    again = launcher.run(*cut, "--resume")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_two_processes_make_the_policy_of_one(launcher: Launcher, tiny: Path, tmp_path: Path) -> None:
    more = ("--activation", "auto", "--activation-sparsity", "0.4")
    assert launcher.run(*words(tiny, tmp_path / "one", *more)).returncode == 0
    for run in launcher.start_group(2, *words(tiny, tmp_path / "two", *more)):
        done = run.wait()
        assert done.returncode == 0, done.stderr
    one, two = policy_of(tmp_path / "one"), policy_of(tmp_path / "two")
    assert one.linears.keys() == two.linears.keys()
    for name in one.linears:
        for part, tensor in one.linears[name].tensors().items():
            assert torch.allclose(tensor, two.linears[name].tensors()[part], rtol=1e-4, atol=1e-6), (name, part)
    losses = [report(tmp_path / run)["evaluation"]["activation"]["after"]["cross_entropy"] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_a_perplexity_target_is_measured_on_other_windows(demo: Path, tmp_path: Path) -> None:
    stage = {"stage": "activation", "method": "wina", "search": False, "target_ppl_increase": "3%", "seqlen": 32}
    stage |= {"calibration": str(demo / "calibration.txt"), "nsamples": 8}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": [stage]}))
    (found,) = compress(demo, tmp_path / "out", load_recipe(path))["stages"]
    assert 0 < found["validation"]["increase"] <= 0.03
    assert found["validation"]["windows"] == 8
    assert 0.01 < found["sparsity"] < 0.97


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        (("--activation", "teal"), "activation policy 'teal' is unknown"),
        (("--activation", "auto", "--activation-sparsity", "1.5"), r"must be in \[0, 1\), got 1.5"),
        (("--activation", "auto", "--activation-sparsity", "0.5", "--target-speedup", "2"), "give one of"),
        (("--activation", "auto", "--target-ppl-increase", "0%"), r"must be in \(0, 1\]"),
        (("--activation", "auto", "--target-ppl-increase", "1"), r"is an increase by 100%.*"),
        (("--activation", "auto", "--target-speedup", "0.9"), "above 1"),
        (("--activation", "auto", "--reconstruct"), "belongs to pruning"),
        (("--activation", "auto", "--activation-guide", "similarity"), "guide belongs to coreinfer"),
    ],
)
def test_mistakes_are_named(options, words_: str, tiny: Path, tmp_path: Path) -> None:
    from gossamer.cli.recipes import recipe_from_options

    names = {"--activation": "method", "--activation-sparsity": "sparsity", "--target-speedup": "target_speedup"}
    names |= {"--target-ppl-increase": "target_ppl_increase", "--activation-guide": "guide"}
    prune = {"reconstruct": True} if "--reconstruct" in options else {}
    given = [word for word in options if word != "--reconstruct"]
    fields = {names[key]: value for key, value in zip(given[::2], given[1::2], strict=True)}
    with pytest.raises(RecipeError, match=words_):
        recipe_from_options(prune, {}, {}, {}, {}, no_eval=True, activation=fields)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("asked", "own", "used"),
    [
        ("auto", torch.float32, torch.float32),
        ("auto", torch.float16, torch.float32),
        ("float16", torch.bfloat16, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_the_dtype_of_a_calibration(asked, own, used):
    assert calibration_dtype(Machine(dtype=asked), own, "cpu") == used


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_calibrated_in_its_own_where_the_processor_multiplies_it(native, monkeypatch):
    monkeypatch.setattr(plan, "_multiplies", lambda: native)
    assert calibration_dtype(Machine(), torch.bfloat16, "cpu") == (torch.bfloat16 if native else torch.float32)
    assert calibration_dtype(Machine(), torch.bfloat16, "cuda") == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_a_checkpoint_in_bfloat16(native: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, fits and residuals in either arithmetic come to nearly the same policy."""
    seen: list[torch.dtype] = []

    class Noted(activation.Calibration):
        def __init__(self, model: Any, *given: Any, **more: Any) -> None:
            seen.append(model.dtype)
            super().__init__(model, *given, **more)

    monkeypatch.setattr(plan, "_multiplies", lambda: native)
    monkeypatch.setattr(activation, "Calibration", Noted)
    source = tmp_path / "half"
    shutil.copytree(tiny, source)
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(source)
    stage = ActivationStage(
        method="auto", sparsity=0.4, calibration=str(tiny / "calibration.txt"), nsamples=12, seqlen=32, search=False
    )
    compress(source, tmp_path / "out", Recipe(stages=(stage,)))
    assert seen == [torch.bfloat16 if native else torch.float32]
    policy = policy_of(tmp_path / "out")
    assert policy.facts["calibrated"] == pytest.approx(0.4, abs=0.01)
    assert len(policy.linears) == 21
    assert all(entry.threshold.dtype == torch.float32 for entry in policy.linears.values())
