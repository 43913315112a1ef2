"""Stages that prune while they train: exact zeros, every order with `prune`, soups, mistakes."""

from __future__ import annotations

import signal

import pytest
import torch
from phases import KINDS, SIZE, matrices, metrics, run, stage, zeros
from tiny import report, save_llama, save_texts, tensors

from gossamer.compress.inspect import inspect_model
from gossamer.compress.progress import Progress
from gossamer.compress.recipe import (
    PruneStage,
    Recipe,
)
from gossamer.compress.run import compress
from gossamer.errors import DataError, RecipeError, TrainingError

KILLED = -signal.SIGKILL

# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_exact_and_everything_else_was_trained(tiny, tmp_path, kind):
    found, said = run(tiny, tmp_path / "out", stage(kind, tiny, sparsity=0.7))
    source = tensors(tiny)
    assert zeros(found) == said["sparsity"]["zeros"] == round(0.7 * SIZE)
    assert len({int((t == 0).sum()) / t.numel() for t in matrices(found).values()}) > 3  # one threshold for all
    assert not torch.equal(found["model.norm.weight"], source["model.norm.weight"])
    assert not torch.equal(found["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert int((found["model.embed_tokens.weight"] == 0).sum()) == 0
    assert said["stages"][0]["stage"] == kind
    assert len(said["layers"]) == 21


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_imp_in_other_units(tiny, tmp_path, scope):
    found, _ = run(tiny, tmp_path / "out", stage("imp", tiny, sparsity=0.75, scope=scope, phases=2))
    for key, tensor in matrices(found).items():
        assert int((tensor == 0).sum()) == round(0.75 * tensor.numel()), key
        if scope == "row":
            assert len(set((tensor == 0).sum(1).tolist())) == 1, key


@pytest.mark.parametrize("kind", ["imp", "soup"])
def test_phases_follow_the_schedule(tiny, tmp_path, kind):
    _, said = run(tiny, tmp_path / "out", stage(kind, tiny, sparsity=0.875, phases=3))
    entries = said["stages"][0]["phases"]
    assert [e["sparsity"] for e in entries] == pytest.approx([0.5, 0.75, 0.875], abs=1e-4)
    assert [e["pruned"] for e in entries] == pytest.approx([0.5] * 3, abs=1e-3)
    assert all(0 < e["damage"] < 1 for e in entries)
    runs = said["training"]
    steps = [2, 3, 3] if kind == "imp" else [2, 2, 3, 3, 3, 3]
    assert [run["steps"] for run in runs] == steps


def test_allr_goes_through_a_phase_that_prunes_nothing(tiny, tmp_path):
    """2:4 in three phases is 3:4, 3:4, 2:4."""
    notes = []

    class Notes(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    own = stage("imp", tiny, pattern="2:4", phases=3, schedule="allr", steps=6)
    compress(tiny, tmp_path / "out", Recipe(stages=[own]), progress=Notes())
    said = report(tmp_path / "out")
    assert [entry["pruned"] for entry in said["stages"][0]["phases"]] == pytest.approx([1 / 4, 0, 1 / 3])
    rates = [line["lr"] for line in metrics(tmp_path / "out")][::2]
    assert 0 < rates[0] < rates[1] == own.learning_rate > rates[2] > 0
    assert notes == ["phase 2 prunes nothing: its learning rate is that of llr"]


@pytest.mark.parametrize(("pattern", "share"), [("1:4", 0.75), ("block:4x8", 0.5)])
def test_structured_patterns_are_proved_by_inspect(tiny, tmp_path, pattern, share):
    compress(tiny, tmp_path / "out", Recipe(stages=[stage("imp", tiny, pattern=pattern)]))
    found = inspect_model(tmp_path / "out")
    assert found["sparsity"]["prunable"] == share
    rows = [row for row in found["layers"] if "_proj" in row["key"]]
    assert len(rows) == 21
    for row in rows:
        assert row["pattern"].startswith(pattern)
        assert row["sparsity"] == share
        assert row["holds_pattern"] in (True, None)


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_any_one_shot_score_gives_the_masks(tiny, tmp_path, score):
    found, said = run(tiny, tmp_path / "out", stage("imp", tiny, sparsity=0.6, score=score, phases=2, nsamples=4))
    for key, tensor in matrices(found).items():
        assert int((tensor == 0).sum()) == round(0.6 * tensor.numel()), key
    assert {row["method"] for row in said["layers"]} == {f"imp ({score})"}


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Tensors after 30 % by magnitude."""
    return run(tiny, tmp_path_factory.mktemp("pruned") / "out", PruneStage(method="magnitude", sparsity=0.3))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_before_and_after_prune_masks_only_shrink(tiny, pruned, tmp_path, kind):
    own, prune = stage(kind, tiny, sparsity=0.6, scope="matrix"), PruneStage(method="magnitude", sparsity=0.3)
    more = PruneStage(method="magnitude", sparsity=0.8, scope="matrix")
    early = pruned
    late, _ = run(tiny, tmp_path / "late", prune, own)
    last, said = run(tiny, tmp_path / "last", own, more)
    for key, tensor in matrices(late).items():
        assert not bool(((early[key] == 0) & (tensor != 0)).any()), key
        assert int((tensor == 0).sum()) == round(0.6 * tensor.numel()), key
        assert int((last[key] == 0).sum()) == round(0.8 * tensor.numel()), key
    assert [entry["stage"] for entry in said["stages"]] == [kind, "prune"]


def test_fused_experts_and_transposed_matrices(tmp_path):
    from families import save_family

    for family in ("gpt2", "mixtral"):
        model = save_family(family, tmp_path / family)
        (model / "calibration.txt").write_text(" ".join(f"w{(i * 7 + i // 5) % 40}" for i in range(4000)))
        from tiny import save_words

        save_words(model, 64)
        for kind in ("imp", "soup", "gradual"):
            own = stage(kind, model, sparsity=0.5, seqlen=8, steps=3)
            compress(model, tmp_path / f"{family}-{kind}", Recipe(stages=[own]))
            assert report(tmp_path / f"{family}-{kind}")["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-4)


# ---- soups -----------------------------------------------------------------------------------------------------------


def test_candidates_differ_in_one_factor_and_the_uniform_soup_is_their_mean(tiny, tmp_path, monkeypatch):
    import gossamer.compress.stages.soup as module

    kept: dict[int, dict[str, torch.Tensor]] = {}
    configs = []
    load, train = module.StateFile.tensors, module.SoupPhase._train

    def tensors_of(self):
        found = load(self)
        if self.path.name.startswith("candidate-"):
            kept[int(self.path.stem[-1])] = found
        return found

    def trained(self, masked, phase, index, *rest):
        configs.append(self._configs(phase, rest[0])[index][1])
        train(self, masked, phase, index, *rest)

    monkeypatch.setattr(module.StateFile, "tensors", tensors_of)
    monkeypatch.setattr(module.SoupPhase, "_train", trained)
    own = stage("soup", tiny, sparsity=0.5, phases=1, candidates=3, factor="weight-decay", soup="uniform")
    found, said = run(tiny, tmp_path / "out", own)
    assert [c.weight_decay for c in configs] == [0.0, 0.01, 0.02]
    assert len({(c.seed, c.learning_rate, c.steps, c.batch) for c in configs}) == 1
    for key, tensor in found.items():
        mean = sum(kept[i][key].double() for i in (1, 2, 3)) / 3
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-8)
        if "_proj" in key:
            assert all(torch.equal(kept[i][key] == 0, tensor == 0) for i in (1, 2, 3)), key
    (entry,) = said["stages"][0]["phases"]
    assert entry["weights"] == [1 / 3] * 3
    assert entry["heldout"] == entry["compared"]["uniform"]["loss"]


def test_candidates_of_several_lengths_with_tokens(tiny, tmp_path):
    own = stage("soup", tiny, phases=2, candidates=3, factor="length", soup="uniform", steps=None, tokens=4 * 128)
    _, said = run(tiny, tmp_path / "out", own)
    assert [run["steps"] for run in said["training"]] == [2, 3, 1] * 2


@pytest.mark.parametrize("soup", ["uniform", "greedy", "learned", "best"])
def test_best_single_and_ensemble_are_always_reported(tiny, tmp_path, soup):
    own = stage("soup", tiny, sparsity=0.5, phases=2, soup=soup, learning_steps=2, measure=str(tiny / "heldout.txt"))
    _, said = run(tiny, tmp_path / "out", own)
    for entry in said["stages"][0]["phases"]:
        single = [candidate["heldout"] for candidate in entry["candidates"]]
        assert entry["compared"]["best"]["loss"] == pytest.approx(min(single))
        assert entry["compared"]["greedy"]["loss"] <= min(single) + 1e-12
        assert entry["ensemble"] < max(single)
        assert entry["heldout"] == entry["compared"][soup]["loss"]
        assert sum(entry["weights"]) == pytest.approx(1)
    measured = said["stages"][0]["phases"][-1]["measured"]
    assert measured["best"] == pytest.approx(measured["candidates"][entry["compared"]["best"]["weights"].index(1.0)])
    assert "measured" not in said["stages"][0]["phases"][0]


def test_a_candidate_with_another_mask_is_refused(tiny, tmp_path, monkeypatch):
    import gossamer.compress.stages.soup as module
    from gossamer.errors import CheckpointError

    write = module.write_state

    def meddle(path, found, masks, more=None):
        if path.name == "candidate-2.safetensors":
            masks = {name: mask.clone() for name, mask in masks.items()}
            masks["model.layers.1.mlp.up_proj.weight"][3, 3] ^= True
        return write(path, found, masks, more)

    monkeypatch.setattr(module, "write_state", meddle)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is masked differently .*candidate 2"):
        run(tiny, tmp_path / "out", stage("soup", tiny, sparsity=0.5, phases=1))


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("imp", {"steps": 2, "phases": 3}, "2 steps are too few for 3 phases"),
        ("imp", {"score": "wandaa"}, "method 'wandaa' is unknown"),
        ("imp", {"score": "wanda", "scope": "model"}, "scope model is not possible with wanda"),
        ("imp", {"pattern": "3:7"}, "32 inputs are not a multiple of 7"),
        ("imp", {"sparsity": 1.0}, "sparsity must be in"),
        ("imp", {"sparsity": 0.5, "pattern": "2:4"}, "not both"),
        ("imp", {"include": ("nothing",)}, "matches no matrix"),
        ("soup", {"factor": "sed"}, "factor 'sed' is unknown"),
        ("soup", {"factor": "learning-rate", "factor_values": ("1e-3",)}, "1 values of learning-rate for 2 candidates"),
        ("soup", {"soup": "greedy", "heldout": 0.0}, "chooses on held-out text"),
        ("soup", {"candidates": 1}, "candidates"),
        ("soup", {"factor": "length", "steps": 3, "candidates": 3}, "candidates must differ in length, got 1, 2, 1"),
        ("soup", {"factor": "length", "factor_values": ("2", "x")}, "'x' is not a value of length"),
        ("soup", {"margin": float("nan")}, "margin must be a finite number"),
        ("imp", {"calibration": "none.txt"}, "score magnitude looks at no text, and calibration none.txt is given"),
        ("imp", {"nsamples": 4}, "score magnitude looks at no text, and nsamples 4 is given"),
        ("imp", {"temperature": float("inf")}, "temperature must be a finite number, got inf"),
        ("imp", {"weight_decay": float("inf")}, "weight_decay must be a finite number, got inf"),
        ("gradual", {"schedule": "allr"}, "only the stages imp and soup have phases"),
        ("random", {"schedule": "allr"}, "only the stages imp and soup have phases"),
        ("gradual", {"pattern": "2:4"}, "follows a curve"),
        ("gradual", {"begin": 0.8, "end": 0.5}, "begin 0.8 lies behind end 0.5"),
        ("random", {"steps": 3, "tries": 4}, "3 training steps cannot be shared by 4"),
    ],
)
def test_mistakes_are_found_before_a_weight_is_read(tiny, tmp_path, kind, options, said):
    with pytest.raises(RecipeError, match=said):
        compress(tiny, tmp_path / "out", Recipe(stages=[stage(kind, tiny, **options)]))
    assert not (tmp_path / "out.partial").exists()


def test_empty_and_short_texts(tiny, tmp_path):
    for text in ("", "ka to mi"):
        (tmp_path / "short.txt").write_text(text)
        with pytest.raises(DataError):
            compress(tiny, tmp_path / "out", Recipe(stages=[stage("imp", tiny, data=str(tmp_path / "short.txt"))]))


@pytest.mark.parametrize("kind", ["imp", "soup", "gradual", "random"])
def test_a_target_below_what_is_pruned(tiny, tmp_path, kind):
    """In the recipe or in the source: known before anything is done."""
    out, own = tmp_path / "out", stage(kind, tiny, sparsity=0.4)
    with pytest.raises(RecipeError, match=r"0\.4 is below the 0\.59"):
        run(tiny, out, PruneStage(method="magnitude", sparsity=0.6), own)
    assert not (tmp_path / "out.partial").exists()
    if kind == "imp":
        run(tiny, tmp_path / "pruned", PruneStage(method="magnitude", sparsity=0.6))
        with pytest.raises(RecipeError, match=r"0\.4 is below the 0\.59"):
            run(tmp_path / "pruned", out, own)
        assert not (tmp_path / "out.partial").exists()
        run(tiny, out, PruneStage(method="magnitude", sparsity=0.4), stage("gradual", tiny, sparsity=0.4))


@pytest.mark.parametrize(("kind", "which"), [("imp", "^"), ("soup", r"^candidate 1 of phase 1 \(seed 0\): ")])
def test_a_loss_that_is_not_finite_names_the_step(tmp_path, kind, which):
    model = save_llama(tmp_path / "model")
    save_texts(model)
    own = stage(kind, model, learning_rate=1e30, clip=None)
    with pytest.raises(TrainingError, match=which + r".* not finite at step \d"):
        run(model, tmp_path / "out", own)
    assert (tmp_path / "out.partial").exists()
