"""Targets below what is pruned already: masks may only shrink, and that is known before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..pruning.pattern import Unstructured
from .jobs import MatrixJob
from .source import FolderSource

if TYPE_CHECKING:
    from .plan import StagePlan


def check_targets(stages: Sequence[StagePlan], source: FolderSource) -> None:
    """RecipeError for the first stage that asks for less than the source and the stages before it have pruned.

    `stages`: in the order in which they run. What cannot be counted from names, shapes and masks (stacked experts of a
    source) counts as nothing; the stage itself looks again.
    """
    pruned: dict[str, int] = {}
    for stage in stages:
        before = {job.name: pruned.get(job.name, _held(job, source)) for job in stage.jobs}
        if stage.jobs:
            stage.check_before(sum(before.values()) / sum(job.size for job in stage.jobs))
        pruned |= {job.name: max(before[job.name], _planned(job)) for job in stage.jobs}


def _held(job: MatrixJob, source: FolderSource) -> int:
    """Zeros that the source's mask of this matrix promises."""
    record = source.record(job.keys[0]) if len(job.keys) == 1 else None
    return record.zeros if record is not None and math.prod(record.shape) == job.size else 0


def _planned(job: MatrixJob) -> int:
    """At least this many zeros, on average over the matrices when they are compared with each other."""
    if isinstance(job.pattern, Unstructured) and job.pattern.scope == "model":
        return math.floor(job.pattern.sparsity * job.size)
    return job.zeros
