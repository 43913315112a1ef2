"""IMP and soups in two gloo processes equal those of one, and every rank holds the same masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import Done
from sharding import FSDP, ON_CPU, SHARDED
from tiny import tensors

TOLERANCE = 2e-5  # of weights around 0.15: gradients are summed in another order
WATCH = """
import json, os
from gossamer.compress.stages.masked_model import Masked
from gossamer.compress.wholestate import packed_masks
from gossamer.pruning.mean import masks_sha256
save = Masked.save
def saved(self, path):
    save(self, path)
    name = os.environ["MASKS"] + "-" + os.environ.get("RANK", "0")
    with open(name, "a") as file:
        file.write(masks_sha256(packed_masks(self.masks)) + "\\n")
Masked.save = saved
"""


def run(launcher, tiny: Path, out: Path, stage: dict, count: int, *, sharded: bool = False) -> list[Done]:
    common = {"data": str(tiny / "calibration.txt"), "seqlen": 32, "steps": 6, "batch": 4, "sparsity": 0.6}
    recipe = out.with_suffix(".yaml")
    stages = [common | stage, {"stage": "export", "format": "dense"}]
    recipe.write_text(yaml.safe_dump({"stages": stages}))
    words = ["compress", tiny, "-o", out, "--recipe", recipe]
    own = {"MASKS": str(out) + ".masks", **(FSDP if sharded else {})}
    before = WATCH + ON_CPU + SHARDED if sharded else WATCH
    return [process.wait() for process in launcher.start_group(count, *words, env=own, before=before)]


def masks_of(out: Path, rank: int) -> list[str]:
    return Path(f"{out}.masks-{rank}").read_text().split()


def same(one: Path, two: Path) -> None:
    left, right = tensors(one), tensors(two)
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=0, atol=TOLERANCE)
        assert torch.equal(right[name] == 0, tensor == 0), name


STAGES = {
    "imp": {"stage": "imp", "phases": 2},
    "soup": {"stage": "soup", "phases": 2, "candidates": 3, "soup": "uniform"},
    "greedy": {"stage": "soup", "soup": "greedy", "phases": 1, "candidates": 2, "factor": "learning-rate"},
    "learned": {"stage": "soup", "phases": 1, "candidates": 3, "soup": "learned", "learning_steps": 2},
}


@pytest.mark.parametrize(
    "stage",
    [pytest.param(s, id=n, marks=pytest.mark.slow if n in ("greedy", "learned") else []) for n, s in STAGES.items()],
)
def test_two_processes_equal_one(launcher, tiny, tmp_path, stage):
    """Three candidates on two processes: one trains two of them."""
    for count, name in ((1, "one"), (2, "two")):
        for done in run(launcher, tiny, tmp_path / name, stage, count):
            assert done.returncode == 0, done.stderr
    same(tmp_path / "one", tmp_path / "two")
    ranks = [masks_of(tmp_path / "two", rank) for rank in (0, 1)]
    assert ranks[0] == ranks[1] == masks_of(tmp_path / "one", 0)
    assert len(ranks[0]) == stage["phases"]
    said = [json.loads((tmp_path / name / "report.json").read_text())["stages"][0]["phases"] for name in ("one", "two")]
    for alone, both in zip(*said, strict=True):
        assert both["heldout"] == pytest.approx(alone["heldout"], abs=1e-4)
        assert both.get("weights") == pytest.approx(alone.get("weights"), abs=1e-3)


def test_more_processes_than_candidates(launcher, tiny, tmp_path):
    every = run(launcher, tiny, tmp_path / "out", {"stage": "soup", "candidates": 2}, 3)
    assert [done.returncode for done in every] == [2, 2, 2]
    (error,) = [line for done in every for line in done.errors()]
    assert "3 processes were started for 2 candidates" in error
    assert not (tmp_path / "out.partial").exists()


UNDER_FSDP2 = STAGES | {
    "gradual": {"stage": "gradual", "begin": 0.0, "end": 0.7, "every": 1},
    "random": {"stage": "random", "tries": 2},
    "gradual of all": {"stage": "gradual", "begin": 0.2, "end": 0.7, "every": 2, "scope": "model"},
}


@pytest.mark.parametrize(
    "name",
    [
        "imp",
        "soup",
        "gradual",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("greedy", "random", "gradual of all")),
    ],
)
def test_under_fsdp2_two_processes_equal_one(launcher, tiny, tmp_path, name):
    """Both hold a part of every model; all of them train each candidate of a soup."""
    stage = UNDER_FSDP2[name]
    for count, folder in ((1, "one"), (2, "two")):
        for done in run(launcher, tiny, tmp_path / folder, stage, count, sharded=count == 2):
            assert done.returncode == 0, done.stderr
    same(tmp_path / "one", tmp_path / "two")
    if "phases" in stage:  # of others the masks are compared by `same` alone
        ranks = [masks_of(tmp_path / "two", rank) for rank in (0, 1)]
        assert ranks[0] == ranks[1] == masks_of(tmp_path / "one", 0)


def test_a_soup_under_fsdp2_may_have_fewer_candidates_than_processes(launcher, tiny, tmp_path):
    stage = {"stage": "soup", "phases": 1, "candidates": 2, "soup": "uniform", "batch": 6}
    for done in run(launcher, tiny, tmp_path / "out", stage, 3, sharded=True):
        assert done.returncode == 0, done.stderr
