"""The nm-flow stage: mistakes before weights, patterns by name, other stages before and after it, kills, processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family
from tiny import digests, save_words, tensors

from gossamer.compress.inspect import inspect_model
from gossamer.compress.recipe import EvaluateStage, ExportStage, NmFlowStage, PruneStage, Recipe, build
from gossamer.compress.run import compress, plan
from gossamer.errors import RecipeError
from gossamer.pruning.flow_schedule import KINDS

KILLED = -signal.SIGKILL


def flow(model: Path, **options: Any) -> NmFlowStage:
    own = {"data": str(model / "calibration.txt"), "seqlen": 32, "steps": 6, "batch": 2, "log_every": 1}
    return NmFlowStage(**(own | options))


def run(model: Path, out: Path, *stages: Any, form: str = "dense") -> tuple[dict[str, torch.Tensor], dict]:
    compress(model, out, Recipe(stages=[*stages, ExportStage(format=form)]))
    return tensors(out), json.loads((out / "report.json").read_text())


def kept_per_group(weight: torch.Tensor, group: int) -> int:
    """Most entries that are not zero in a group of inputs."""
    return int((weight.reshape(len(weight), -1, group) != 0).sum(-1).max())


# ---- what cannot be ----


def test_the_recipe_and_the_leaf_name_the_same_flows():
    assert NmFlowStage.model_fields["flow"].annotation.__args__ == tuple(KINDS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "0.5"}, "nm-flow trains N:M patterns, got '0.5'"),
        ({"patterns": {"mlp": "half"}}, "nm-flow trains N:M patterns, got 'half'"),
        ({"patterns": {"(": "2:4"}}, r"'\(' is not a valid regular expression"),
        ({"flow": "mdgf"}, "flow must be 'mdgf-exp'"),
        ({"tail": 2}, "tail must be less than or equal to 1"),
        ({"decay": 0}, "decay must be greater than 0"),
        ({"patern": "1:4"}, "patern is no field of a recipe; did you mean pattern"),
        ({"steps": 5, "tokens": 5}, "give tokens or steps, not both"),
        ({"schedule": "allr"}, "allr starts from the damage of a pruning phase, and only the stages imp and soup"),
        ({"tail": float("nan")}, "tail must be a finite number"),
    ],
)
def test_a_recipe_that_cannot_be(options, said):
    with pytest.raises(RecipeError, match=said):
        build(NmFlowStage, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "1:48"}, "pattern 1:48 does not fit model.layers.0.self_attn.q_proj: its 32 inputs are not a mul"),
        ({"pattern": "5:4"}, "keeps 5 of every 4"),
        ({"patterns": {"self_attn": "2:4", "mlp": "1:24"}}, "pattern 1:24 does not fit .*mlp.gate_proj.* 8 more of 9"),
        ({"patterns": {"attention": "2:4"}}, "patterns: 'attention' matches no matrix"),
        ({"patterns": {"proj": "dense"}}, "nothing is left to prune"),
        ({"flow": "ste", "decay": 1.0}, "schedule ste has no decay"),
        ({"seqlen": 100}, "longer than the model's 64 positions"),
    ],
)
def test_mistakes_are_found_before_a_weight_is_read(tiny, tmp_path, options, said):
    with pytest.raises(RecipeError, match=said):
        plan(tiny, tmp_path / "out", Recipe(stages=[flow(tiny, **options)]))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("tail", [1.0, 0.8])  # 0.8 of 2 steps rounds to both of them
def test_a_tail_of_all_steps(tiny, tmp_path, tail):
    found, _ = run(tiny, tmp_path / "out", flow(tiny, steps=2, tail=tail, pattern="1:4"))
    for key, tensor in found.items():
        if "_proj" in key:
            assert kept_per_group(tensor, 4) == 1, key
    lines = (tmp_path / "out" / "gossamer" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["flips"] for line in lines] == [0.0, 0.0]


def test_experts_of_one_tensor_have_one_pattern(tmp_path):
    model = family("mixtral", tmp_path)
    with pytest.raises(RecipeError, match=r"the experts of .*gate_up_proj are one tensor"):
        plan(model, tmp_path / "out", Recipe(stages=[flow(model, exclude=(r"gate_up_proj\.0",), pattern="2:4")]))


def test_the_plan_names_patterns_and_what_stays_dense(tiny, tmp_path):
    stage = flow(tiny, pattern="1:8", patterns={"q_proj": "dense", "self_attn": "2:4"})
    found = plan(tiny, tmp_path / "out", Recipe(stages=[stage])).changes[0]
    assert {str(job.pattern) for job in found.jobs if "mlp" in job.name} == {"1:8"}
    assert {str(job.pattern) for job in found.jobs if "attn" in job.name} == {"2:4"}
    assert [why for name, why in found.skipped if "q_proj" in name] == ["dense by `patterns`"] * 3


# ---- what comes out ----


@pytest.mark.parametrize("kind", ["mdgf-linear", "sdgf-geometric"])
def test_attention_and_mlp_apart_and_inspect_proves_it(tiny, tmp_path, kind):
    stage = flow(tiny, flow=kind, pattern="1:8", patterns={"self_attn": "2:4"}, exclude=("v_proj",))
    found, report = run(
        tiny, tmp_path / "out", stage, EvaluateStage(data=str(tiny / "heldout.txt"), windows=2), form="both"
    )
    for name, tensor in found.items():
        if "mlp" in name:
            assert kept_per_group(tensor, 8) == 1, name
        elif "self_attn" in name and "v_proj" not in name:
            assert kept_per_group(tensor, 4) == 2, name
        else:
            assert bool((tensor != 0).all()), name
    seen = {row["key"]: row for row in inspect_model(str(tmp_path / "out"))["layers"]}
    patterns = {key: (row["pattern"], row["holds_pattern"]) for key, row in seen.items() if "_proj" in key}
    assert {value for key, value in patterns.items() if "mlp" in key} == {("1:8", True)}
    assert {value for key, value in patterns.items() if "attn" in key and "v_proj" not in key} == {("2:4", True)}
    assert [row["steps"] for row in report["training"]] == [6]
    lines = [json.loads(text) for text in (tmp_path / "out" / "gossamer" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all("flips" in line and "beta" in line for line in lines)
    assert len(report["layers"]) == 18
    left_out = [note for note in report["notes"] if note.startswith("frame 8:64 is left out of")]
    assert len(left_out) == (kind == "sdgf-geometric")


def family(name: str, folder: Path) -> Path:
    model = save_family(name, folder / name)
    save_words(model, 61)
    text = " ".join(f"w{2 + (i * i + i // 7) % 50}" for i in range(3000))
    (model / "calibration.txt").write_text(text)
    return model


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_transposed_and_stacked_matrices(tmp_path, name):
    """GPT-2 stores [in, out]; a mixture's experts are one tensor. Groups lie along the inputs all the same."""
    model = family(name, tmp_path)
    stage = flow(model, pattern="1:4", flow="mdgf-exp", seqlen=16, learning_rate=1e-2)
    found, report = run(model, tmp_path / "out", stage)
    before = tensors(model)
    pruned = [row["name"] for row in report["layers"]]
    assert len(pruned) == {"gpt2": 12, "mixtral": 42}[name]
    zeros = {key: tensor for key, tensor in found.items() if tensor.dim() == 2 and bool((tensor == 0).any())}
    assert zeros
    for key, tensor in zeros.items():
        rows = tensor.t() if name == "gpt2" else tensor
        assert kept_per_group(rows, 4) == 1, key
        assert int((tensor == 0).sum()) == tensor.numel() * 3 // 4, key
        assert not torch.equal(tensor[tensor != 0], before[key][tensor != 0]), key
    for key, tensor in found.items():
        if key.endswith("bias"):
            assert not torch.equal(tensor, before[key]), f"{key} was not trained"


# ---- before and after other stages ----


def prune(model: Path, **options: Any) -> PruneStage:
    return PruneStage(
        **{"method": "wanda", "calibration": str(model / "calibration.txt"), "nsamples": 6, "seqlen": 32} | options
    )


@pytest.mark.parametrize("kind", ["mdgf-exp", "ste"])
def test_after_prune_masks_only_shrink(tiny, tmp_path, kind):
    first = prune(tiny, sparsity=0.6)
    early, _ = run(tiny, tmp_path / "one", first)
    late, report = run(tiny, tmp_path / "two", first, flow(tiny, flow=kind, exclude=("mlp",), learning_rate=1e-2))
    assert [row["stage"] for row in report["layers"]] == [0] * 21 + [1] * 12
    for key, before in early.items():
        if "_proj" not in key:
            continue
        after = late[key]
        assert not bool(((before == 0) & (after != 0)).any()), key
        if "attn" in key:
            assert kept_per_group(after, 4) <= 2, key
        else:  # not in this stage: trained under the mask that it had
            assert torch.equal(before == 0, after == 0), key
            assert not torch.equal(before, after), key


def test_before_prune_the_pattern_holds_to_the_end(tiny, tmp_path):
    found, report = run(tiny, tmp_path / "out", flow(tiny, pattern="2:4"), prune(tiny, sparsity=0.75), form="both")
    for key, tensor in found.items():
        if "_proj" in key:
            assert kept_per_group(tensor, 4) <= 2, key
            assert int((tensor == 0).sum()) == round(0.75 * tensor.numel()), key
    assert [entry["stage"] for entry in report["stages"]] == ["nm-flow", "prune"]


# ---- kills and processes, through the command ----

COMMAND = ("--method", "nm-flow", "--pattern", "1:4", "--seqlen", "32", "--steps", "8", "--set", "batch=4")
COMMAND += ("--set", "flow=sr-ste", "--set", "save_every=2", "--set", "log_every=1", "--no-eval", "--format", "both")


def words(model: Path, out: Path, *more: str) -> list[str | Path]:
    return ["compress", model, "-o", out, "--data", model / "calibration.txt", *COMMAND, *more]


def at_step(step: int, number: str) -> str:
    """Python that sends itself a signal when optimizer step `step` begins."""
    return f"""
import os, signal
from gossamer.finetune.flow_steps import FlowSteps
before = FlowSteps.on_step_begin
def on_step_begin(self, args, state, control, **more):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.{number})
    before(self, args, state, control, **more)
FlowSteps.on_step_begin = on_step_begin
"""


@pytest.fixture(scope="module")
def whole(launcher, tiny, tmp_path_factory) -> Path:
    """What an undisturbed run in one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = launcher.run(*words(tiny, out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("step", "number", "code"),
    [pytest.param(1, "SIGKILL", KILLED, marks=pytest.mark.slow), (5, "SIGKILL", KILLED), (5, "SIGINT", 130)],
)
def test_a_run_that_was_stopped_goes_on_exactly(launcher, tiny, tmp_path, whole, step, number, code):
    out = tmp_path / "out"
    stopped = launcher.run(*words(tiny, out), before=at_step(step, number))
    assert stopped.returncode == code, stopped.stderr
    assert not out.exists()
    again = launcher.run(*words(tiny, out, "--resume"))
    assert again.returncode == 0, again.stderr
    assert digests(out) == digests(whole)


def test_two_processes_have_the_masks_of_one(launcher, tiny, tmp_path, whole):
    for rank in launcher.start_group(2, *words(tiny, tmp_path / "two")):
        done = rank.wait()
        assert done.returncode == 0, done.stderr
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, tmp_path / "two")]
    assert reports[0]["masks"] == reports[1]["masks"]
    one, two = tensors(whole), tensors(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
