"""Whole models of a run: opened with their masks, written as parts that read back bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import save_family

from gossamer.compress.journal import Journal
from gossamer.compress.progress import Progress, Recorder
from gossamer.compress.recipe import PruneStage, Recipe
from gossamer.compress.run import plan
from gossamer.compress.stages.base import Context
from gossamer.compress.whole import kept_of, matrix_in, open_whole, view, write_whole
from gossamer.errors import ModelError


def context_of(model, tmp_path) -> Context:
    job = plan(model, tmp_path / "out", Recipe(stages=(PruneStage(method="magnitude"),)))
    partial = tmp_path / "out.partial"
    return Context(job, partial, Journal.start(partial, {}), Recorder(Progress()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2"])
def test_what_is_written_is_read_back(tmp_path, family):
    """Magnitude by hand in the [out, in] view, 1 of 4 kept: other orientations and fused experts included."""
    context = context_of(save_family(family, tmp_path / "model"), tmp_path)
    jobs = context.plan.changes[0].jobs
    model = open_whole(context)
    masks = kept_of(model, jobs)
    expected = {}
    for job in jobs:
        weight = view(model, job.prunable)
        keep = matrix_in(masks, model, job.prunable)
        keep[:, torch.arange(weight.shape[1]) % 4 != job.prunable.shape[0] % 4] = False
        weight.masked_fill_(~keep, 0).add_(keep * 0.25)
        expected[job.name] = (weight.clone(), keep.clone())
    folder = context.part_folder(context.plan.changes[0])
    write_whole(context, model, masks, dict.fromkeys(masks, "mixed"), folder)
    context.finished.append(folder)
    again = open_whole(context)
    read = kept_of(again)
    assert read.keys() == masks.keys()
    for job in jobs:
        weight, keep = expected[job.name]
        assert torch.equal(view(again, job.prunable), weight), job.name
        assert torch.equal(matrix_in(read, again, job.prunable), keep), job.name
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_revived_weight_is_refused(tmp_path):
    context = context_of(save_family("llama", tmp_path / "model"), tmp_path)
    model = open_whole(context)
    masks = kept_of(model, context.plan.changes[0].jobs)
    name = next(iter(masks))
    masks[name].view(-1)[5] = False
    with pytest.raises(ModelError, match="1 pruned weights are not zero"):
        write_whole(context, model, masks, dict.fromkeys(masks, "mixed"), tmp_path / "parts")


def test_attaching_stages_run_after_the_last_change():
    from gossamer.compress.plan import StagePlan, in_order

    def stage(index, changes, attaches):
        return StagePlan(index, SimpleNamespace(stage="s", changes_weights=changes, attaches=attaches))

    stages = [stage(0, False, "heads"), stage(1, False, None), stage(2, True, None), stage(3, False, None)]
    assert [s.index for s in in_order(stages)] == [1, 2, 0, 3]
    assert [s.index for s in in_order(stages[:2])] == [0, 1]
