"""`gossamer finetune` in two gloo processes, data parallel and sharded: the weights of one process but for rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from processes import Done, Launcher
from sharding import FSDP, ON_CPU, SHARDED
from tiny import report, tensors

from gossamer.compress.load import load
from gossamer.compress.recipe import ExportStage, PruneStage, Recipe
from gossamer.compress.run import compress


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "sparse"
    compress(tiny, out, Recipe(stages=(PruneStage(method="magnitude", sparsity=0.6), ExportStage(format="sparse"))))
    return out


class Runs:
    """The same fine-tuning in one process or two."""

    def __init__(self, launcher: Launcher, tiny: Path, pruned: Path) -> None:
        self.launcher, self.tiny, self.pruned = launcher, tiny, pruned

    def run(
        self,
        count: int,
        out: Path,
        *more: str,
        env: Mapping[str, str] | None = None,
        before: Mapping[int, str] | None = None,
    ) -> list[Done]:
        words = [
            "finetune", self.pruned, "-o", out, "--data", self.tiny / "calibration.txt", "--seqlen", 32, "--no-eval",
            "--steps", 10, "--set", "batch=8", "--set", "save_every=4", "--format", "both", *more,
        ]  # fmt: skip
        running = self.launcher.start_group(count, *words, env=env, before=before or "")
        return [process.wait() for process in running]

    def finished(self, count: int, out: Path, *more: str, **options) -> dict[str, torch.Tensor]:
        for done in self.run(count, out, *more, **options):
            assert done.returncode == 0, done.stderr
        return tensors(out)


@pytest.fixture(scope="module")
def runs(launcher, tiny, pruned):
    return Runs(launcher, tiny, pruned)


def masks(folder: Path) -> dict[str, str]:
    found = load(folder, packed=False).gossamer_masks
    return {name: hashlib.sha256(mask.to_bool().numpy().tobytes()).hexdigest() for name, mask in found.items()}


METHODS = {
    "full": ["--method", "full", "--learning-rate", "1e-3", "--set", "accumulation=2"],
    "masklora": ["--method", "masklora", "--learning-rate", "3e-3"],
}
MODES = {"ddp": ({}, ""), "fsdp2": (FSDP, ON_CPU + SHARDED)}


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[] if n == "full" else pytest.mark.slow) for n in METHODS]
)
def single(request, runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / request.param
    runs.finished(1, out, *METHODS[request.param])
    return METHODS[request.param], out


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_the_weights_of_one(runs, single, pruned, tmp_path, mode):
    """Sums of the same 8 rows per step in another order: equal within 1e-3 of the largest entry after 10 steps."""
    options, out = single
    env, before = MODES[mode]
    found = runs.finished(2, tmp_path / "two", *options, env=env, before={0: before, 1: before})
    for name, tensor in tensors(out).items():
        assert (found[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name
        if "proj" in name:
            assert torch.equal(found[name] == 0, tensor == 0), name
    assert masks(tmp_path / "two") == masks(out) == masks(pruned)
    assert report(tmp_path / "two")["masks"] == report(pruned)["masks"]
    one, two = (report(folder)["training"][0] for folder in (out, tmp_path / "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_loss_that_is_no_number_on_one_rank_stops_both(runs, tmp_path):
    poison = """
from gossamer.finetune import trainer
plain = trainer.loss_sum
calls = []
def poisoned(*arguments):
    calls.append(1)
    return plain(*arguments) * (float("nan") if len(calls) == 6 else 1.0)
trainer.loss_sum = poisoned
"""
    done = runs.run(2, tmp_path / "out", before={1: poison})
    assert [one.returncode for one in done] == [1, 1], [one.stderr for one in done]
    errors = [line for one in done for line in one.errors()]
    assert len(errors) == 1
    assert "the loss is not finite at step 6; the last good checkpoint is checkpoint-4" in errors[0]


def test_ranks_with_different_masks_do_not_begin(runs, tmp_path):
    flip = """
from gossamer.finetune import bookkeeping
plain = bookkeeping.MaskGuard
def other(model, masks):
    masks = {name: mask.clone() for name, mask in masks.items()}
    first = next(iter(masks.values()))
    first[0, 0] = ~first[0, 0]
    return plain(model, masks)
bookkeeping.MaskGuard = other
"""
    done = runs.run(2, tmp_path / "out", "--method", "full", before={1: flip})
    assert [one.returncode for one in done] == [1, 1], [one.stderr for one in done]
    assert "rank 1 holds another mask of" in "".join(line for one in done for line in one.errors())
