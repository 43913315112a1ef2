"""The output matrix of a prune stage: pruned, or given a weight of its own, after the last block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...pruning.base import LayerStats
from .. import distributed
from ..blocks import StreamedModel
from ..calibration import accumulator_for
from ..jobs import MatrixJob
from ..plan import PrunePlan
from .base import Context
from .matrix import MatrixPruner
from .parts import head_path, write_exported
from .streams import Streams


def head_jobs(plan: PrunePlan) -> list[MatrixJob]:
    """The output matrix, where the stage prunes it."""
    return [job for job in plan.jobs if job.prunable.kind == "head"]


def prune_head(
    context: Context,
    plan: PrunePlan,
    matrices: MatrixPruner,
    streams: Streams | None,
    needs: frozenset[str],
    folder: Path,
) -> list[dict[str, Any]]:
    """Its row; none where the stage asks for neither. Part files in `folder`, and a unit in the journal."""
    jobs, model = head_jobs(plan), matrices.model
    # Whether the checkpoint ties them is asked of the plan's skeleton: this stage's own model is untied already.
    untying = plan.stage.untie and not context.untied and context.plan.skeleton.head_is_tied
    if not jobs and not untying:
        return []
    unit = f"{plan.name}/head"
    done = context.journal.done(unit)
    if done is not None:
        return done["rows"]
    head = model.load_head()
    rows: list[dict[str, Any]] = []
    mask: Tensor | None = None
    if jobs:
        stats = None if streams is None else head_stats(model, jobs[0], head, streams, needs)
        row, mask = matrices.prune(head, jobs[0], stats, {}, 0)
        rows.append(row)
    promise = str(matrices.patterns[jobs[0].name]) if jobs else ""

    def write() -> None:
        exported = model.export_head(head, mask)
        write_exported(head_path(folder), exported, {item.key: promise for item in exported})

    distributed.on_main(write)
    context.finish(unit, {"rows": rows})
    return rows


def head_stats(
    model: StreamedModel, job: MatrixJob, head: torch.nn.Module, streams: Streams, needs: frozenset[str]
) -> LayerStats:
    """Statistics of the output matrix: its input is the final norm's output, its target its own dense output."""
    accumulator = accumulator_for(
        model, head, None, [job.prunable], needs - {"target"}, streams.windows, streams.args.length, {}
    )
    with model.outer():
        for window in distributed.turns(streams.windows):
            found = None
            if window is not None:
                found = {job.name: model.head_input(streams.hidden.get(window), streams.args, window)}
            for seen in distributed.in_turn(found, model.device):
                accumulator.add(seen[job.name], None)
    return accumulator.finish()[job.name]
