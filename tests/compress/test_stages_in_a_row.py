"""Recipes of several stages: masks only ever shrink, every stage reports, every form of the output agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tensors

from gossamer.compress.recipe import EvaluateStage, ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress
from gossamer.compress.source import open_source

METHODS = ["magnitude", "wanda", "ria", "sparsegpt", "gossamer"]


def prune(tiny: Path, **options) -> PruneStage:
    return PruneStage(**{"calibration": str(tiny / "calibration.txt"), "nsamples": 4, "seqlen": 32} | options)


def score(tiny: Path) -> EvaluateStage:
    return EvaluateStage(data=str(tiny / "heldout.txt"), seqlen=32, windows=3)


def run(model: Path, out: Path, *stages, form: str = "dense") -> tuple[dict[str, torch.Tensor], dict]:
    """The written dense tensors and the report."""
    compress(model, out, Recipe(stages=[*stages, ExportStage(format=form)]))
    return tensors(out), json.loads((out / "report.json").read_text())


def matrices(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in found.items() if "_proj" in key}


@pytest.fixture(scope="module")
def pruned_once(tiny, tmp_path_factory):
    """The dense tensors after a prune stage with these options alone; every run is made once."""
    found: dict[str, dict[str, torch.Tensor]] = {}

    def once(**options) -> dict[str, torch.Tensor]:
        key = repr(options)
        if key not in found:
            found[key], _ = run(tiny, tmp_path_factory.mktemp("once") / "out", prune(tiny, **options))
        return found[key]

    return once


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", [pytest.param("wanda", marks=pytest.mark.slow), "gossamer"])
def test_a_second_prune_never_revives_a_weight(tiny, pruned_once, tmp_path, first, second):
    one = prune(tiny, method=first, sparsity=0.3)
    early = pruned_once(method=first, sparsity=0.3)
    late, report = run(tiny, tmp_path / "two", one, prune(tiny, method=second, sparsity=0.6))
    assert len(matrices(early)) == 21
    for key, before in matrices(early).items():
        after = late[key]
        assert not bool(((before == 0) & (after != 0)).any()), key
        assert int((after == 0).sum()) == round(0.6 * after.numel()), key
    assert [(row["stage"], row["sparsity"]) for row in report["layers"]] == [
        (stage, pytest.approx(share, abs=1e-3)) for stage, share in ((0, 0.3), (1, 0.6)) for _ in range(21)
    ]
    assert {row["method"] for row in report["layers"] if row["stage"] == 1} == {second}
    assert [entry["stage"] for entry in report["stages"]] == ["prune", "prune"]


@pytest.mark.parametrize(
    "method", [m if m in ("wanda", "gossamer") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_a_weaker_second_prune_changes_no_mask(tiny, pruned_once, tmp_path, method):
    """30 % after 60 %: all that was pruned stays pruned, and nothing more goes."""
    early = pruned_once(method="wanda", sparsity=0.6)
    stages = [prune(tiny, method="wanda", sparsity=0.6), prune(tiny, method=method, sparsity=0.3)]
    late, _ = run(tiny, tmp_path / "two", *stages)
    for key, before in matrices(early).items():
        assert bool((late[key][before == 0] == 0).all()), key
        assert int((late[key] == 0).sum()) == int((before == 0).sum()), key


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gossamer"])
def test_n_of_m_after_unstructured(tiny, pruned_once, tmp_path, method):
    stages = [prune(tiny, method="wanda", sparsity=0.4), prune(tiny, method=method, pattern="2:4")]
    early = pruned_once(method="wanda", sparsity=0.4)
    late, _ = run(tiny, tmp_path / "two", *stages)
    for key, after in matrices(late).items():
        assert int((after.view(-1, 4) != 0).sum(1).max()) <= 2, key
        assert not bool(((early[key] == 0) & (after != 0)).any()), key


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_pruning_a_pruned_checkpoint(tiny, tmp_path, form):
    """Its masks are explicit, and hold for the next run as they do for the next stage."""
    run(tiny, tmp_path / "one", prune(tiny, method="gossamer", sparsity=0.3), form=form)
    early = {key: open_source(tmp_path / "one").read(key) for key in open_source(tmp_path / "one").keys()}
    late, report = run(tmp_path / "one", tmp_path / "two", prune(tiny, method="sparsegpt", sparsity=0.6))
    for key, before in matrices(early).items():
        assert not bool(((before == 0) & (late[key] != 0)).any()), key
        assert int((late[key] == 0).sum()) == round(0.6 * before.numel())
    assert report["sparsity"]["before"] == pytest.approx(0.3, abs=1e-3)


def test_different_matrices_in_two_stages(tiny, tmp_path):
    stages = [prune(tiny, method="wanda", include=("mlp",)), prune(tiny, pattern="2:4", include=("self_attn",))]
    found, report = run(tiny, tmp_path / "out", *stages)
    patterns = {row["name"].split(".")[3]: row["pattern"] for row in report["layers"]}
    assert patterns == {"mlp": "0.5", "self_attn": "2:4"}
    for key, tensor in matrices(found).items():
        assert int((tensor == 0).sum()) == tensor.numel() // 2, key
        if "self_attn" in key:
            assert int((tensor.view(-1, 4) != 0).sum(1).max()) == 2


def test_prune_evaluate_export(tiny, tmp_path):
    """Each evaluation is of the model as it stood; the last one is the report's own."""
    first, second = prune(tiny, method="wanda", sparsity=0.3), prune(tiny, method="wanda", sparsity=0.6)
    _, report = run(tiny, tmp_path / "both", first, score(tiny), second, score(tiny), form="both")
    middle, end = report["evaluations"]
    assert [entry["stage"] for entry in report["stages"]] == ["prune", "evaluate", "prune", "evaluate"]
    assert [entry["index"] for entry in report["stages"]] == [0, 1, 2, 3]
    assert middle["before"] == end["before"]
    assert middle["after"] != end["after"]
    assert report["evaluation"] == {key: end[key] for key in report["evaluation"]}
    _, alone = run(tiny, tmp_path / "alone", first, score(tiny))
    assert alone["evaluation"]["after"] == middle["after"]
    dense, sparse = tensors(tmp_path / "both"), open_source(tmp_path / "both")
    assert all(torch.equal(dense[key], sparse.read(key)) for key in dense)
    assert (tmp_path / "both" / "model.sparse.safetensors").exists()


def test_the_recipe_file_runs_and_is_kept(tiny, launcher, tmp_path):
    """What the checkpoint keeps as recipe.yaml makes the same checkpoint again."""
    text = f"""
seed: 3
stages:
- {{stage: prune, method: wanda, sparsity: 0.3, calibration: {tiny}/calibration.txt, nsamples: 4, seqlen: 32}}
- {{stage: evaluate, data: {tiny}/heldout.txt, windows: 2}}
- {{stage: prune, method: sparsegpt, pattern: '2:4', calibration: {tiny}/calibration.txt, nsamples: 4, seqlen: 32}}
- {{stage: export, format: dense}}
"""
    (tmp_path / "r.yaml").write_text(text)
    for recipe, out in (("r.yaml", "out"), ("out/recipe.yaml", "again")):
        done = launcher.run("compress", tiny, "-o", out, "--recipe", recipe, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for line in ("prune with wanda: 3 blocks", "evaluate before: 3 blocks", "prune with sparsegpt: 3 blocks"):
            assert line in done.stderr
    assert (tmp_path / "out" / "recipe.yaml").read_text() == (tmp_path / "again" / "recipe.yaml").read_text()
    first, again = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert all(torch.equal(first[key], again[key]) for key in first)
