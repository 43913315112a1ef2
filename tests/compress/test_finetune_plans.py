"""What the finetune stage refuses before it reads a weight, how much it looks at at once, and what its files say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from tiny import report, save_llama, save_words
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gossamer.cli.main import app
from gossamer.compress import training
from gossamer.compress.instructions import Example
from gossamer.compress.load import load
from gossamer.compress.recipe import ExportStage, FinetuneStage, PruneStage, Recipe, build
from gossamer.compress.run import compress
from gossamer.compress.traindata import pack
from gossamer.errors import RecipeError
from gossamer.finetune.spiel import method

SHORT = {"steps": 6, "batch": 4, "seqlen": 16, "log_every": 1, "save_every": 0}
MOVING = {"method": "spiel-ag", "interval": 2, "window": 1, "density": 0.05}


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """60 % of every matrix but one."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune = PruneStage(method="magnitude", sparsity=0.6, exclude=("layers.0.self_attn.q_proj",))
    compress(tiny, out, Recipe(stages=(prune, ExportStage())))
    return out


@pytest.fixture(scope="module")
def sparse(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse") / "out"
    compress(tiny, out, Recipe(stages=(PruneStage(method="magnitude", sparsity=0.6), ExportStage())))
    return out


def tune(tiny, **fields) -> FinetuneStage:
    return FinetuneStage(data=str(tiny / "calibration.txt"), **(SHORT | fields))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sparse", {**MOVING, "where": "all"}, "bring pruned weights"),
        ("sparse", {"method": "lora"}, "cannot keep the zeros"),
        ("sparse", {**MOVING, "density": 0.5}, "the masks allow"),
        ("pruned", {**MOVING, "where": "kept"}, "1 of its matrices have none"),
        ("tiny", {**MOVING, "where": "kept"}, "the model has none"),
        ("tiny", {**MOVING, "where": "seft"}, "the model has none"),
        ("tiny", {**MOVING, "method": "spiel-ma", "allocation": "global"}, "allocation 'global' compares scores"),
    ],
)
def test_refused_before_a_weight_is_read(tiny, pruned, sparse, tmp_path, name, fields, message):
    model = {"tiny": tiny, "pruned": pruned, "sparse": sparse}[name]
    with pytest.raises(RecipeError, match=message):
        compress(model, tmp_path / "out", Recipe(stages=(tune(tiny, **fields),)))
    assert not list(tmp_path.iterdir())
    words = [f"--set={k}={v}" for k, v in (fields | SHORT).items() if k not in ("method", "steps", "seqlen")]
    words = [w for w in words if "density" not in w] + ["--density", str(fields.get("density", ""))]
    words = words if "density" in fields else words[:-2]
    done = CliRunner().invoke(app, [
        "finetune", str(model), "-o", str(tmp_path / "out"), "--data", str(tiny / "calibration.txt"), "--method",
        fields["method"], "--steps", "6", "--seqlen", "16", "--dry-run", "--no-eval", *words,
    ])  # fmt: skip
    assert done.exit_code == 2
    assert message.split()[0] in done.output + done.stderr


@pytest.mark.parametrize("fields", [{**MOVING, "where": "all"}, {"method": "lora"}])
def test_refused_behind_a_prune_stage(tiny, tmp_path, fields):
    stages = (PruneStage(method="magnitude"), tune(tiny, **fields), ExportStage())
    with pytest.raises(RecipeError, match="pruned"):
        compress(tiny, tmp_path / "out", Recipe(stages=stages))
    assert not list(tmp_path.iterdir())  # pruning has not begun


def test_a_density_that_seft_has_room_for(tiny, sparse, tmp_path):
    fields = {**MOVING, "density": 0.5, "where": "seft"}
    compress(sparse, tmp_path / "out", Recipe(stages=(tune(tiny, **fields), ExportStage())))
    assert report(tmp_path / "out")["sparsity"]["zeros"] == report(sparse)["sparsity"]["zeros"]


def test_scores_and_held_out_rows_come_in_micro_batches(tiny, tmp_path, monkeypatch):
    seen = []
    usual = method.loss_sum
    monkeypatch.setattr(method, "loss_sum", lambda *a: seen.append(len(a[4])) or usual(*a))
    from gossamer.compress import training

    rows = training.row_losses
    monkeypatch.setattr(training, "row_losses", lambda m, r, b: seen.append(b) or rows(m, r, b))
    compress(tiny, tmp_path / "out", Recipe(stages=(tune(tiny, method="static", density=0.05, accumulation=4),)))
    assert set(seen) == {1}


def test_nothing_held_out(tiny, tmp_path):
    compress(tiny, tmp_path / "out", Recipe(stages=(tune(tiny, heldout=0, **MOVING),)))
    found = next(s for s in report(tmp_path / "out")["stages"] if s["stage"] == "finetune")
    assert found["heldout"] == {"rows": 0, "before": None, "after": None, "standard_error": None}


def test_the_adapter_names_its_base(tiny, tmp_path):
    compress(tiny, tmp_path / "out", Recipe(stages=(tune(tiny, **MOVING),)))
    config = json.loads((tmp_path / "out/gossamer/adapter-0/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny.name  # not where it lay
    assert len(config["layer_fingerprints"]) == 21


def test_churn_is_the_same_after_a_resume(tiny, tmp_path):
    """Checkpoints lie between two lines of metrics.jsonl."""
    from gossamer.finetune.spiel.config import SpielConfig
    from gossamer.finetune.spiel.model import SpielModel
    from gossamer.finetune.spiel.optimizer import SpielOptimizer
    from gossamer.finetune.tokens import TokenRows
    from gossamer.finetune.training import TrainingConfig, train

    rows = TokenRows(torch.randint(0, 320, (8, 16), generator=torch.Generator().manual_seed(0)))

    def history(folder, steps, resume):
        model = AutoModelForCausalLM.from_pretrained(tiny)
        SpielModel(model, SpielConfig(density=0.05, interval=2, window=1), "default")
        log = method.ChurnLog(lambda m: SpielOptimizer(m, 1e-3, 12))
        stop = type("Stop", (method.ChurnLog,), {
            "on_step_end": lambda self, args, state, control, **more: setattr(
                control, "should_training_stop", state.global_step >= steps)
        })(None)  # fmt: skip
        config = TrainingConfig(
            folder=folder, steps=12, batch=2, save_every=5, log_every=4, resume=resume, callbacks=(log, stop),
            make_optimizer=log.make,
        )  # fmt: skip
        return [(line["step"], line.get("churn")) for line in train(model, config, data=rows).history]

    whole = history(tmp_path / "whole", 12, False)
    history(tmp_path / "resumed", 7, False)
    assert history(tmp_path / "resumed", 12, True) == whole


# ---- examples that would see each other ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_instructions_get_rows_of_their_own_where_the_model_mixes_them(tmp_path, kind):
    from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = {
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)),
    }[kind]()  # fmt: skip
    made.save_pretrained(tmp_path / "model")
    save_words(tmp_path / "model", 97)
    lines = [json.dumps({"prompt": f"w{k} w{k + 1}", "response": f"w{2 * k % 97} w3"}) for k in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    stage = FinetuneStage(data=str(tmp_path / "data.jsonl"), method="full", **(SHORT | {"seqlen": 24}))
    compress(tmp_path / "model", tmp_path / "out", Recipe(stages=(stage,)))
    found = report(tmp_path / "out")
    assert any("a row of its own" in note for note in found["notes"]) == (kind == "bloom")


# ---- what a mask is called, and where help is ------------------------------------------------------------------------


def test_pst_records_the_sparsity_that_there_is(tiny, sparse, tmp_path):
    stage = tune(tiny, method="pst", rank=2, score_rank=2)
    compress(sparse, tmp_path / "out", Recipe(stages=(stage, ExportStage())))
    for mask in load(tmp_path / "out", packed=False).gossamer_masks.values():
        assert float(mask.pattern) == pytest.approx(mask.zeros / mask.to_bool().numel())
        assert float(mask.pattern) > 0.59


def test_a_bad_field_points_to_the_right_help(tiny, tmp_path):
    done = CliRunner().invoke(app, ["finetune", str(tiny), "-o", str(tmp_path / "out"), "--set", "batch=x"])
    assert done.exit_code == 2
    text = " ".join((done.output + done.stderr).split())
    assert "`--help` says what is allowed" in text
    assert "gossamer compress --help" not in text


def test_a_pruned_model_is_distilled_from_the_dense_one(tiny, sparse, tmp_path):
    fields = {"method": "full", "loss": "distill", "learning_rate": 1e-3}
    with pytest.raises(RecipeError, match="distilled from itself, it would learn nothing") as told:
        compress(sparse, tmp_path / "itself", Recipe(stages=(tune(tiny, **fields),)))
    assert "--teacher" in told.value.hint
    assert not list(tmp_path.iterdir())
    out = tmp_path / "out"
    compress(sparse, out, Recipe(stages=(tune(tiny, teacher=str(tiny), **fields), ExportStage(format="dense"))))
    first = json.loads((out / "gossamer/metrics.jsonl").read_text().splitlines()[0])["loss"]
    teacher, student, before = (
        AutoModelForCausalLM.from_pretrained(tiny),
        AutoModelForCausalLM.from_pretrained(out),
        load(sparse, dtype="float32", packed=False),
    )
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found, began = (model(input_ids=ids).logits.log_softmax(-1) for model in (teacher, student, before))
    far, near = ((wanted.exp() * (wanted - one)).sum(-1).mean() for one in (began, found))
    assert first == pytest.approx(float(far), rel=0.5)
    assert near < far


def test_a_teacher_with_other_tokens_is_refused(tiny, sparse, tmp_path):
    from families import save_family

    other = save_family("llama", tmp_path / "other")
    with pytest.raises(RecipeError, match="tokens, .* has"):
        compress(sparse, tmp_path / "out", Recipe(stages=(tune(tiny, method="full", loss="mix", teacher=str(other)),)))
    with pytest.raises(RecipeError, match="the loss is of the text alone"):
        build(FinetuneStage, data=str(tiny / "calibration.txt"), teacher=str(tiny))


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        ({"hidden_size": 64}, {"loss": "lm", "hidden": 0.5}, "has 64 hidden channels, .* has 32"),
        ({"num_hidden_layers": 2}, {"hidden": 0.5}, "has 2 blocks, .* has 3"),
        ({"max_position_embeddings": 8}, {}, "rows of 16 tokens are longer than the 8 positions of the teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tiny, sparse, tmp_path, config, fields, said):
    other = save_llama(tmp_path / "other", **config)
    tuned = tune(tiny, **{"method": "full", "loss": "distill", "teacher": str(other)} | fields)
    with pytest.raises(RecipeError, match=said):
        compress(sparse, tmp_path / "out", Recipe(stages=(tuned,)))
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_of_that_size_is_refused(tiny, sparse, tmp_path):
    other = save_llama(tmp_path / "other")
    save_words(other, 320)
    tuned = tune(tiny, method="full", loss="distill", teacher=str(other))
    with pytest.raises(RecipeError, match="has another tokenizer than"):
        compress(sparse, tmp_path / "out", Recipe(stages=(tuned,)))


@pytest.mark.parametrize(("family", "packed"), [("llama", True), ("opt", False)])
def test_packed_examples_are_apart_for_the_teacher_too(monkeypatch, family, packed):
    """OPT takes no notice of positions that begin again, so a Llama that learns from it gets one example per row."""
    student, teacher = (
        AutoModelForCausalLM.from_config(FAMILIES[name].config(), dtype=torch.float32) for name in ("llama", family)
    )
    rows = pack([Example([3, 4, 5, 6], [3, 4, 5, 6])] * 6, 8, 0)
    plan = SimpleNamespace(stage=SimpleNamespace(needs_teacher=True), text=SimpleNamespace(train=rows))
    seen = {}
    monkeypatch.setattr(training, "train", lambda model, config, masks, **given: seen.update(given))
    training.retrainer(None, plan, teacher)(student, None)
    assert (seen["data"] is rows) == packed
    assert len(seen["data"]) == (3 if packed else 6)
