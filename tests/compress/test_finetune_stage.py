"""The finetune stage and command: on every kind of folder, after prune, killed and resumed; masks never change."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from families import save_family
from tiny import digests, report, save_llama, save_words, tensors, words

from gossamer.compress.inspect import inspect_model
from gossamer.compress.recipe import ExportStage, FinetuneStage, PruneStage, Recipe
from gossamer.compress.run import compress
from gossamer.errors import DataError, RecipeError

METHODS = ["masklora", "bias-norm", "full"]
KILL = """
import os, signal
from gossamer.finetune.bookkeeping import Bookkeeping
plain = Bookkeeping.on_step_end
def stop(self, args, state, control, **more):
    plain(self, args, state, control, **more)
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.{signal})
Bookkeeping.on_step_end = stop
"""


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """Sparse, dense with masks, and what they were made from."""
    folder = tmp_path_factory.mktemp("pruned")
    for form in ("sparse", "dense"):
        stages = (PruneStage(method="magnitude", pattern="2:4"), ExportStage(format=form))
        compress(tiny, folder / form, Recipe(stages=stages))
    return folder


def stage(tiny, **fields) -> FinetuneStage:
    values = {"data": str(tiny / "calibration.txt"), "seqlen": 32, "steps": 12, "log_every": 4, "batch": 4}
    return FinetuneStage(**(values | fields))


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pruned_checkpoint_keeps_its_masks(tiny, pruned, tmp_path, method, form):
    out = tmp_path / "out"
    made = compress(pruned / form, out, Recipe(stages=(stage(tiny, method=method), ExportStage(format="both"))))
    before = report(pruned / "sparse")
    assert made["masks"] == before["masks"]
    assert made["sparsity"]["zeros"] == before["sparsity"]["zeros"]
    (entry,) = [e for e in made["stages"] if e["stage"] == "finetune"]
    assert entry["zeros"] == before["sparsity"]["zeros"]
    assert entry["heldout"]["after"] < entry["heldout"]["before"]
    new, old = tensors(out), tensors(pruned / "dense")
    moved = {name for name in old if not torch.equal(new[name], old[name])}
    norms = {name for name in old if "norm" in name}
    expected = {"bias-norm": norms, "masklora": norms | {n for n in old if "proj" in n}, "full": set(old)}[method]
    assert moved == expected
    for name, tensor in old.items():
        if "proj" in name:
            assert torch.equal(new[name] == 0, tensor == 0), name
            assert not torch.signbit(new[name][tensor == 0]).any(), name
    rows = inspect_model(out)["layers"]
    assert {(row["pattern"], row["holds_pattern"]) for row in rows} == {("2:4", True)}


def test_what_lies_beside_the_report(tiny, pruned, tmp_path):
    made = compress(pruned / "sparse", tmp_path / "out", Recipe(stages=(stage(tiny),)))
    lines = [json.loads(line) for line in (tmp_path / "out/gossamer/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert {"loss", "lr", "sparsity", "tokens_per_s", "tokens"} <= lines[0].keys()
    assert (tmp_path / "out/gossamer/training.png").read_bytes().startswith(b"\x89PNG")
    (run,) = made["training"]
    assert (run["steps"], run["tokens"], run["sparsity"]) == (12, 12 * 4 * 32, 0.5)
    assert "history" not in json.dumps(made.data)
    assert (tmp_path / "out/report.html").read_text().count("data:image/png") == 1


def test_an_ordinary_model_is_trained_as_it_is(tiny, tmp_path):
    stages = (stage(tiny, method="full"), ExportStage(format="dense"))
    made = compress(tiny, tmp_path / "out", Recipe(stages=stages))
    assert made["sparsity"]["prunable"] == 0
    assert made["training"][0]["sparsity"] is None
    new, old = tensors(tmp_path / "out"), tensors(tiny)
    assert all(not torch.equal(new[name], old[name]) for name in old)


def test_as_second_stage_and_before_another(tiny, tmp_path):
    """prune, finetune, prune again: the second mask lies inside the first, whatever training did."""
    stages = (
        PruneStage(method="magnitude", sparsity=0.4),
        stage(tiny, method="full"),
        PruneStage(method="magnitude", sparsity=0.6),
    )
    first = compress(tiny, tmp_path / "first", Recipe(stages=(*stages[:1], ExportStage(format="dense"))))
    made = compress(tiny, tmp_path / "out", Recipe(stages=(*stages, ExportStage(format="dense"))))
    assert first["sparsity"]["prunable"] == pytest.approx(0.4, abs=1e-3)
    assert made["sparsity"]["prunable"] == pytest.approx(0.6, abs=1e-3)
    new, old = tensors(tmp_path / "out"), tensors(tmp_path / "first")
    for name in old:
        if "proj" in name:
            assert not new[name][old[name] == 0].any()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2"])
def test_other_families(tmp_path, family):
    """Conv1D, fused experts (which masklora leaves as they are), biases; a checkpoint in bfloat16."""
    model = save_family(family, tmp_path / "model", dtype=torch.bfloat16)
    save_words(model, 97)
    (model / "text.txt").write_text(" ".join(f"w{(7 * k * k + k // 3) % 97}" for k in range(1500)))
    prune = PruneStage(method="magnitude")
    tune = FinetuneStage(data=str(model / "text.txt"), seqlen=12, steps=6, batch=4)
    compress(model, tmp_path / "plain", Recipe(stages=(prune, ExportStage(format="dense"))))
    made = compress(model, tmp_path / "out", Recipe(stages=(prune, tune, ExportStage(format="dense"))))
    assert made["masks"] == report(tmp_path / "plain")["masks"]
    new, old = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert {name: t.dtype for name, t in new.items()} == {name: t.dtype for name, t in old.items()}
    assert sum(not torch.equal(new[name], old[name]) for name in old) > 2
    notes = [note for note in made["notes"] if "fused expert" in note]
    assert bool(notes) == (family == "mixtral")


def test_distillation_needs_no_other_model(tiny, pruned, tmp_path):
    """The teacher is the model that the recipe began with, unless another one is named: here, the pruned one itself."""
    tune = stage(tiny, method="full", loss="distill", steps=4, log_every=1)
    made = compress(tiny, tmp_path / "out", Recipe(stages=(PruneStage(method="magnitude"), tune)))
    lines = [json.loads(line) for line in (tmp_path / "out/gossamer/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] > 0.01
    assert made["sparsity"]["prunable"] == 0.5
    itself = tune.model_copy(update={"teacher": str(pruned / "sparse")})
    compress(pruned / "sparse", tmp_path / "same", Recipe(stages=(itself,)))
    lines = [json.loads(line) for line in (tmp_path / "same/gossamer/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] < 1e-5


# ---- the command -----------------------------------------------------------------------------------------------------


def command(tiny, model, out, *more):
    return [
        "finetune", model, "-o", out, "--data", tiny / "calibration.txt", "--seqlen", 32, "--steps", 12,
        "--eval", tiny / "heldout.txt", "--eval-windows", 3, "--set", "batch=4", "--set", "save_every=5", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny, pruned, launcher, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = launcher.run(*command(tiny, pruned / "sparse", out))
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_command_tells_and_writes(undisturbed):
    out, done = undisturbed
    assert "perplexity" in done.stdout
    assert "finetune 12/12  loss" in done.stderr
    assert "tokens/s" in done.stderr
    assert not (out.parent / "out.partial").exists()
    assert report(out)["command"].startswith("gossamer finetune")


@pytest.mark.parametrize(("name", "code", "step"), [("SIGKILL", -signal.SIGKILL, 7), ("SIGINT", 130, 7)])
def test_killed_or_interrupted_it_goes_on(tiny, pruned, undisturbed, launcher, tmp_path, name, code, step):
    """From step 5 after a kill, from the very step after Ctrl-C; the files are those of an undisturbed run."""
    words_ = command(tiny, pruned / "sparse", tmp_path / "out")
    done = launcher.run(*words_, before=KILL.format(step=step, signal=name))
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "out").exists()
    if name == "SIGINT":
        assert "--resume to go on from the last checkpoint" in done.stderr
        assert "Traceback" not in done.stderr
    (kept,) = (tmp_path / "out.partial/work/state").rglob("checkpoint-*")
    assert kept.name == ("checkpoint-5" if name == "SIGKILL" else "checkpoint-8")
    again = launcher.run(*words_, "--resume")
    assert again.returncode == 0, again.stderr
    assert digests(tmp_path / "out") == digests(undisturbed[0])


def test_a_dry_run_writes_nothing(tiny, pruned, launcher, tmp_path):
    done = launcher.run(*command(tiny, pruned / "sparse", tmp_path / "out", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert "0-finetune: 12 steps of 4 x 32 tokens (1,536 tokens) on calibration.txt" in done.stdout
    assert list(tmp_path.iterdir()) == []


BAD = [
    ({"method": "lora2"}, RecipeError, "'lora2' is unknown"),
    ({"method": "full", "rank": 4}, RecipeError, "rank means nothing to fine-tuning method full"),
    ({"tokens": 5, "steps": 5}, RecipeError, "tokens or steps, not both"),
    ({"schedule": "lrw"}, RecipeError, "which no checkpoint holds"),
    ({"batch": 5, "accumulation": 2}, RecipeError, "cannot be split into 2"),
    ({"seqlen": 100}, RecipeError, "longer than the model's 64 positions"),
    ({"data": "./nowhere.txt"}, DataError, "does not exist"),
]


@pytest.mark.parametrize(("fields", "error", "match"), BAD)
def test_mistakes_are_found_before_the_work_begins(tiny, tmp_path, fields, error, match):
    from gossamer.compress.recipe import build

    values = {"data": str(tiny / "calibration.txt"), "seqlen": 32}
    if "tokens" not in fields:
        values["steps"] = 2
    with pytest.raises(error, match=match):
        compress(tiny, tmp_path / "out", Recipe(stages=(build(FinetuneStage, **(values | fields)),)))
    assert list(tmp_path.iterdir()) == []


def test_training_and_evaluation_text_must_differ(tiny, tmp_path):
    from gossamer.compress.recipe import EvaluateStage

    stages = (stage(tiny), EvaluateStage(data=str(tiny / "calibration.txt"), seqlen=32))
    with pytest.raises(
        DataError, match="windows of calibration.txt occur in the calibration tokens of calibration.txt"
    ):
        compress(tiny, tmp_path / "out", Recipe(stages=stages))


def test_a_loss_that_explodes_says_where_and_how_to_go_on(tiny, tmp_path):
    from gossamer.errors import TrainingError

    model = save_llama(tmp_path / "model")
    (model / "text.txt").write_text(words(1500, 1))
    tune = stage(tiny, method="full", learning_rate=1e30, clip=None, optimizer="sgd", save_every=1)
    with pytest.raises(TrainingError, match=r"not finite (at|after) step \d+"):
        compress(model, tmp_path / "out", Recipe(stages=(tune,)))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()


def test_a_loaded_model_is_trained_from_python(pruned, tmp_path):
    """Expanded while it is loaded it is an ordinary model with masks; packed it cannot be trained, and says so."""
    from gossamer.compress.load import load
    from gossamer.errors import TrainingError
    from gossamer.finetune.tokens import TokenRows
    from gossamer.finetune.training import TrainingConfig, train

    model = load(pruned / "sparse", packed=False)
    before = {name: mask.to_bool() for name, mask in model.gossamer_masks.items()}
    rows = TokenRows(torch.randint(0, 320, (8, 16)))
    train(model, TrainingConfig(folder=tmp_path / "run", steps=2, batch=4), data=rows)
    assert model.is_quantized  # as it was
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out", packed=False)
    for name, keep in before.items():
        assert torch.equal(again.gossamer_masks[name].to_bool(), keep)
        assert torch.equal(again.get_parameter(name), model.get_parameter(name))
        assert not again.get_parameter(name)[~keep].any()
    packed = load(pruned / "sparse", dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match="the model has no such parameter") as error:
        train(packed, TrainingConfig(folder=tmp_path / "packed", steps=2, batch=4), data=rows)
    assert "packed=False" in error.value.hint
