"""DST as a stage: after prune, on a sparse checkpoint, before prune, and in two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tensors

from gossamer.compress.inspect import inspect_model
from gossamer.compress.recipe import ExportStage, FinetuneStage, PruneStage, Recipe
from gossamer.compress.run import compress
from gossamer.errors import RecipeError


def dst(model: Path, **options: Any) -> FinetuneStage:
    own = {"method": "dst", "data": str(model / "calibration.txt"), "seqlen": 32, "steps": 8, "batch": 2, "every": 2}
    return FinetuneStage(**(own | options))


def prune(**options: Any) -> PruneStage:
    return PruneStage(**({"method": "magnitude"} | options))


def run(model: Path, out: Path, *stages: Any) -> tuple[dict[str, torch.Tensor], dict]:
    compress(model, out, Recipe(stages=[*stages, ExportStage(format="both")]))
    found = {key: tensor for key, tensor in tensors(out).items() if "_proj" in key}
    return found, json.loads((out / "report.json").read_text())


def test_masks_move_and_the_pattern_holds(tiny, tmp_path):
    early, _ = run(tiny, tmp_path / "one", prune(pattern="2:4"))
    late, report = run(tiny, tmp_path / "two", prune(pattern="2:4"), dst(tiny))
    moved = 0
    for key, before in early.items():
        assert int((late[key].reshape(len(before), -1, 4) != 0).sum(-1).max()) == 2, key
        moved += int(((before == 0) & (late[key] != 0)).sum())
    assert report["stages"][1]["moving"] == 21
    assert report["stages"][1]["moved"] >= moved > 0
    assert report["sparsity"]["prunable"] == 0.5
    rows = [row for row in inspect_model(str(tmp_path / "two"))["layers"] if "_proj" in row["key"]]
    assert {(row["pattern"], row["holds_pattern"]) for row in rows} == {("2:4", True)}


def test_on_a_sparse_checkpoint_and_before_prune(tiny, tmp_path):
    early, _ = run(tiny, tmp_path / "one", prune(sparsity=0.5))
    late, _ = run(tmp_path / "one", tmp_path / "two", dst(tiny), prune(sparsity=0.8, scope="matrix"))
    for key, tensor in late.items():
        assert int((tensor == 0).sum()) == round(0.8 * tensor.numel()), key
    moved, _ = run(tmp_path / "one", tmp_path / "three", dst(tiny))
    assert any(bool(((early[key] == 0) & (moved[key] != 0)).any()) for key in moved)


def test_a_dense_model_is_a_mistake(tiny, tmp_path):
    with pytest.raises(RecipeError, match="dst moves masks, and the model has none"):
        compress(tiny, tmp_path / "out", Recipe(stages=[dst(tiny)]))
    assert not (tmp_path / "out.partial").exists()  # found in the plan


def test_two_processes_move_the_same_masks(launcher, tiny, tmp_path):
    run(tiny, tmp_path / "sparse", prune(sparsity=0.6))
    words = ["finetune", tmp_path / "sparse", "--data", tiny / "calibration.txt", "--method", "dst", "--seqlen", "32"]
    words += ["--steps", "8", "--set", "batch=4", "--set", "every=2", "--no-eval", "--format", "both", "-o"]
    ranks = launcher.start_group(2, *words, tmp_path / "2")
    ended = [*(rank.wait() for rank in ranks), launcher.run(*words, tmp_path / "1")]
    assert [done.returncode for done in ended] == [0, 0, 0], [done.stderr for done in ended]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("1", "2")]
    assert reports[0]["masks"] == reports[1]["masks"]
    one, two = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)
