"""The heads stage from end to end on a tiny model: every method, the entry in config.json, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gossamer
from gossamer.attention.observe import observing
from gossamer.attention.plan import FULL, HeadPlan, HeadRule
from gossamer.compress.headplans.validate import judge
from gossamer.compress.progress import Progress
from gossamer.compress.recipe import ActivationStage, EvaluateStage, ExportStage, HeadsStage, PruneStage, Recipe, build
from gossamer.compress.run import compress, plan
from gossamer.compress.score import evaluate_model
from gossamer.errors import DataError, ModelError, RecipeError

QUICK = {
    "nsamples": 2,
    "validation_samples": 2,
    "probe": 0,
    "candidates": 2,
    "refine": 2,
    "lengths": (16, 32),
    "block": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_llama(folder)
    tiny.save_texts(folder)
    return folder


def stage(folder, **changes):
    return build(HeadsStage, **{"calibration": str(folder / "calibration.txt"), **QUICK, **changes})


def run(folder, out, *stages, **changes):
    recipe = Recipe(stages=(*stages, stage(folder, **changes), ExportStage(format="dense")))
    return compress(str(folder), out, recipe)


def entry(out):
    return json.loads((out / "config.json").read_text())["gossamer"]["heads"]


def test_the_plan_is_in_the_checkpoint_and_within_its_density(folder, tmp_path):
    report = run(folder, tmp_path / "out")
    saved = HeadPlan.from_json(entry(tmp_path / "out"))
    assert (saved.layers, saved.kv_heads, saved.query_heads, saved.head_dim) == (3, 2, 4, 8)
    assert saved.lengths == (16, 32)
    for length in (16, 32, 64):  # and twice the longest length, which the model can reach
        assert saved.density(length) <= 0.5 + 1e-9
    made = saved.made
    assert made["seed"] == 0
    assert made["calibration"]["sequences"] == {"16": 2, "32": 2}
    assert len(made["calibration"]["digest"]) == 64
    assert made["validation"]["length"] == 48
    assert made["cost"]["32"]["kv_bytes"] == saved.kv_bytes(32)
    found = report["stages"][0]
    assert found["candidates"][found["chosen"]]["kl"] == min(c["kl"] for c in found["candidates"])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    assert torch.equal(dense(ids).logits, before(ids).logits)


@pytest.mark.parametrize("method", ["uniform", "per-layer", "masformer", "duo"])
def test_rivals_keep_to_the_budget(folder, tmp_path, method):
    run(folder, tmp_path / "out", method=method)
    saved = HeadPlan.from_json(entry(tmp_path / "out"))
    assert saved.made["method"] == method
    assert all(saved.density(n) <= 0.5 + 1e-9 for n in (16, 32, 64))
    if method in ("per-layer", "masformer", "uniform"):
        assert all(len(set(layer)) == 1 for layer in saved.heads)
    if method in ("masformer", "duo"):
        assert FULL in {rule for layer in saved.heads for rule in layer}
        assert len({rule for layer in saved.heads for rule in layer}) == 2


@pytest.mark.parametrize("method", ["gossamer", "per-layer", "uniform"])
def test_sinks_that_cost_more_than_they_gain_hide_no_cheap_rule(folder, tmp_path, method):
    """12 sinks always lose less than none and keep 13 of 16 tokens at least, where 6 are allowed."""
    report = run(folder, tmp_path / "out", method=method, sinks=(0, 12), density=0.375)
    saved = HeadPlan.from_json(entry(tmp_path / "out"))
    assert all(saved.density(n) <= 0.375 + 1e-9 for n in (16, 32, 64))
    for candidate in report["stages"][0]["candidates"]:  # the uniform plan among them
        assert max(candidate["density"].values()) <= 0.375 + 1e-9


def test_a_time_limit_that_is_over_at_once(folder, tmp_path):
    notes = []
    progress = Progress()
    progress.note = notes.append
    recipe = Recipe(stages=(stage(folder, time_limit=1e-6), ExportStage(format="dense")))
    compress(str(folder), tmp_path / "out", recipe, progress=progress)
    assert HeadPlan.from_json(entry(tmp_path / "out")).density(64) <= 0.5 + 1e-9
    assert any("the search for plans was ended by its time limit of 1e-06 s" in note for note in notes)


def test_the_card_says_what_is_beside_the_weights(folder, tmp_path):
    activation = ActivationStage(
        method="threshold", sparsity=0.4, calibration=str(folder / "calibration.txt"), seqlen=32
    )
    run(folder, tmp_path / "out", activation, method="uniform")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a head plan (uniform): of the keys and values it keeps 50.00 % at 16 tokens, 50.00 % at 32 tokens" in card
    assert "an activation policy (threshold): decode skips " in card
    assert "gossamer.load(PATH)" in card
    assert "ordinary checkpoint" not in card
    prune = PruneStage(method="magnitude", sparsity=0.5)
    compress(str(folder), tmp_path / "plain", Recipe(stages=(prune, ExportStage(format="dense"))))
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "ordinary checkpoint" in card
    assert "gossamer.load" not in card


def test_imported_plans(folder, tmp_path):
    path = tmp_path / "moa.json"
    path.write_text(json.dumps({"alphas": np.zeros((3, 4)).tolist(), "betas": np.full((3, 4), 0.25).tolist()}))
    run(folder, tmp_path / "out", method="moa", plan_file=str(path))
    saved = HeadPlan.from_json(entry(tmp_path / "out"))
    assert {rule for layer in saved.heads for rule in layer} == {HeadRule(1, 0, 0.25)}
    assert saved.made["name"] == "moa"
    table = tmp_path / "full_attention_heads.tsv"
    table.write_text("1\t0\n0\t0.5\n0.2\t0.1\n")
    (tmp_path / "config.json").write_text('{"sink_size": 1, "recent_size": 4}')
    run(folder, tmp_path / "out2", method="duo", plan_file=str(tmp_path))
    saved = HeadPlan.from_json(entry(tmp_path / "out2"))
    assert saved.heads[0] == (FULL, HeadRule(1, 5, 0.0))
    table.write_text("1\t0\n")
    with pytest.raises(ModelError, match="1 x 2 layers and KV heads, the model has 3 x 2"):
        run(folder, tmp_path / "out3", method="duo", plan_file=str(tmp_path))


def test_own_answers_are_made_once(folder, tmp_path):
    talk = [{"prompt": tiny.words(30, i), "response": tiny.words(6, 100 + i)} for i in range(12)]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, talk)))
    report = run(folder, tmp_path / "out", calibration=str(path), answers="own")
    made = report["stages"][0]["plan"]["made"]
    assert made["calibration"]["counted"] == "the model's own answers"
    assert made["validation"]["dense_loss"] < 6


def test_after_pruning_it_is_made_on_the_pruned_weights(folder, tmp_path):
    prune = PruneStage(method="magnitude", sparsity=0.5)
    heads = stage(folder)
    evaluate = EvaluateStage(data=str(folder / "heldout.txt"), seqlen=32)
    for order in ((prune, heads, evaluate), (heads, prune, evaluate)):
        out = tmp_path / order[0].stage
        compress(str(folder), out, Recipe(stages=order))
    assert entry(tmp_path / "prune") == entry(tmp_path / "heads")
    run(folder, tmp_path / "dense")
    assert entry(tmp_path / "dense")["made"]["validation"] != entry(tmp_path / "prune")["made"]["validation"]


def test_a_plan_that_keeps_everything_changes_nothing(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    from gossamer.compress.headplans.items import text_item

    full = HeadPlan("llama", 4, 8, 4, (32,), 64, ((FULL, FULL),) * 3)
    narrow = HeadPlan("llama", 4, 8, 4, (32,), 64, ((HeadRule(0, 4, 0.0),) * 2,) * 3)
    before = model.config._attn_implementation
    same, other = judge(model, [full, narrow], [text_item(torch.arange(40))])
    assert same.kl == pytest.approx(0, abs=1e-9)
    assert same.loss == pytest.approx(same.dense_loss, abs=1e-6)
    assert other.kl > 1e-5
    assert model.config._attn_implementation == before
    ids = torch.arange(40)[None]
    seen = []
    with observing(model, lambda layer, *tensors: seen.append(layer)):
        observed = model(ids, use_cache=False).logits
    assert seen == [0, 1, 2]
    assert torch.allclose(observed, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"density": 0.01}, RecipeError, "no plan reaches density 0.01 at length 16"),
        ({"density": 0.01, "method": "uniform"}, RecipeError, "no plan reaches density 0.01 at length 16"),
        ({"density": 0.0}, RecipeError, "density must be in"),
        ({"density": 1.5}, RecipeError, "density must be in"),
        ({"lengths": (32, 128)}, RecipeError, "--lengths 128 is beyond the model's 64 positions"),
        ({"lengths": (32, 16)}, RecipeError, "lengths must be ascending"),
        ({"lengths": (16, 32), "block": 32}, RecipeError, "shorter than one block of 32"),
        ({"method": "moa"}, RecipeError, "give its file"),
        ({"method": "moa", "plan_file": "absent.json"}, DataError, "no MoA plan"),
        ({"plan_file": "x"}, RecipeError, "reads no plan file"),
        ({"calibration": "absent.txt"}, DataError, "absent.txt"),
        ({"calibration": "short.txt"}, DataError, "tokens, one window needs 16"),
        ({"sinks": (-1,)}, RecipeError, "sinks are numbers"),
        ({"method": "best"}, RecipeError, "method must be 'gossamer'"),
    ],
)
def test_bad_input_is_found_before_a_weight_is_read(folder, tmp_path, changes, error, words):
    if "calibration" in changes:
        changes = {"calibration": str(tmp_path / changes["calibration"])}
        (tmp_path / "short.txt").write_text("one two")
    with pytest.raises(error, match=words) as caught:
        plan(str(folder), tmp_path / "out", Recipe(stages=(stage(folder, **changes),)))
    assert "gossamer compress" not in (caught.value.hint or "")
    assert "window needs" not in words or "--lengths of a head plan" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_architecture_without_ordinary_attention(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    tiny.save_texts(tmp_path)
    with pytest.raises(ModelError, match="no head plan can be made for mamba"):
        plan(str(tmp_path), tmp_path / "out", Recipe(stages=(stage(tmp_path),)))


def test_prefill_patterns_are_saved_per_query_head(folder, tmp_path):
    run(folder, tmp_path / "out", method="uniform", prefill="minference")
    found = HeadPlan.from_json(entry(tmp_path / "out")).made["prefill"]
    assert found["method"] == "minference"
    assert [len(layer) for layer in found["heads"]] == [4, 4, 4]
    kinds = {head["kind"] for layer in found["heads"] for head in layer}
    assert kinds <= {"a-shape", "vertical-slash"}
    assert 0 < found["density"] < 1
    assert 0 < found["recall"] < 1


def test_perplexity_is_that_of_the_model_with_its_plan(folder, tmp_path):
    """Block by block with masks, and the whole model as it is loaded; the stage and the command agree."""
    evaluate = EvaluateStage(data=str(folder / "heldout.txt"), seqlen=48)
    heads = stage(folder, method="uniform", density=0.25)
    report = compress(str(folder), tmp_path / "out", Recipe(stages=(heads, evaluate, ExportStage(format="dense"))))
    found = report["evaluation"]
    assert found["head_plan"] == "uniform, density 0.25 at 16 tokens, 0.25 at 32 tokens"
    assert any("the perplexity after is that of the model with its head plan" in note for note in report["notes"])
    alone = evaluate_model(tmp_path / "out", evaluate)
    assert alone["head_plan"] == found["head_plan"]
    assert alone["cross_entropy"] == pytest.approx(found["after"]["cross_entropy"], rel=1e-6)
    dense = evaluate_model(folder, evaluate)
    assert "head_plan" not in dense
    assert found["before"]["cross_entropy"] == pytest.approx(dense["cross_entropy"], rel=1e-6)
    assert abs(alone["cross_entropy"] - dense["cross_entropy"]) > 1e-5
    model, tokenizer = gossamer.load(tmp_path / "out"), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((folder / "heldout.txt").read_text(), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 48 * 48].view(-1, 48)
    with torch.no_grad():
        logits = [model(window[None], use_cache=False).logits[0, :-1] for window in windows]
    losses = [float(torch.nn.functional.cross_entropy(x, y[1:])) for x, y in zip(logits, windows, strict=True)]
    assert alone["cross_entropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
