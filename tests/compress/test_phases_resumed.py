"""Stages that prune while they train, killed or interrupted anywhere: --resume gives the same files."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from phases import KINDS, stage
from tiny import digests

KILLED = -signal.SIGKILL


class Job:
    """A recipe as a command. `run` in a process of its own; `whole` gives the files of an undisturbed run."""

    def __init__(self, launcher, tiny: Path, folder: Path, kind: str, **options) -> None:
        self.launcher, self.tiny, self.folder = launcher, tiny, folder
        first = stage(kind, tiny, sparsity=0.6, save_every=1, **options).model_dump(mode="json", exclude_defaults=True)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump({"stages": [first | {"stage": kind}]}))

    def run(self, out: Path, *more: str, fail: str = "", before: str = ""):
        words = ["compress", self.tiny, "-o", out, "--recipe", self.recipe, *more]
        return self.launcher.run(*words, env={"GOSSAMER_FAILPOINT": fail}, before=before)

    def whole(self) -> dict[str, str]:
        out = self.folder / "whole"
        if not out.exists():
            done = self.run(out)
            assert done.returncode == 0, done.stderr
        return digests(out)


@pytest.fixture(scope="module")
def jobs(launcher, tiny, tmp_path_factory) -> dict[str, Job]:
    found = {}
    for kind in KINDS:
        options = {"phases": 2} if kind in ("imp", "soup") else {}
        found[kind] = Job(launcher, tiny, tmp_path_factory.mktemp(kind), kind, **options)
    return found


POINTS = {
    "imp": ["phase:1", "journal:1", "part:2", "phase:2", "verify"],
    "soup": ["part:2", "part:3", "phase:1", "part:5"],
    "gradual": ["part:1"],
    "random": ["part:2", "journal:1", "part:3"],
}


DEFAULT = {("soup", "part:3"), ("random", "part:2")}


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        pytest.param(kind, point, marks=[] if (kind, point) in DEFAULT else pytest.mark.slow)
        for kind, points in POINTS.items()
        for point in points
    ],
)
def test_a_killed_run_goes_on_to_the_same_files(jobs, tmp_path, kind, point):
    out = tmp_path / "out"
    assert jobs[kind].run(out, fail=point).returncode == KILLED
    assert not out.exists()
    done = jobs[kind].run(out, "--resume")
    assert done.returncode == 0, done.stderr
    assert digests(out) == jobs[kind].whole()


SIGNAL_AT = """
import os, signal
from transformers import Trainer
step = Trainer.training_step
count = 0
def interrupted(self, *args, **more):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.{name})
    return step(self, *args, **more)
interrupted.__globals__.update(step=step, count=0)
Trainer.training_step = interrupted
"""


@pytest.mark.parametrize(
    "kind", [k if k in ("soup", "gradual") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_interrupted_in_the_middle_of_training(jobs, tmp_path, kind, name):
    """The fourth step of the second training run, or of the only one."""
    out = tmp_path / "out"
    done = jobs[kind].run(out, before=SIGNAL_AT.format(at=6, name=name))
    if name == "SIGINT":
        assert done.returncode == 130, done.stderr
        assert "--resume" in done.stderr
    else:
        assert done.returncode == KILLED
    assert not out.exists()
    again = jobs[kind].run(out, "--resume", before=SIGNAL_AT.format(at=10**6, name=name))
    assert again.returncode == 0, again.stderr
    assert digests(out) == jobs[kind].whole()
