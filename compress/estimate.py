"""What a run will need and write, from shapes alone: bytes of the output, disk, and the peak of resident memory.

Bytes are exact. Memory is an estimate, from what each phase holds at once (docs/log.md has measured peaks beside it):
what the process holds already, and whatever the hungriest stage says it needs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ResourceError
from . import memory
from .format import packed_bytes
from .needs import Peak
from .plan import Plan, StagePlan
from .stages.registry import stage_kind


@dataclass(frozen=True)
class Estimate:
    """`payload`: tensor bytes of each form that is written. `disk`: bytes needed while it runs, parts, masks and hidden
    states that do not fit into memory included; `free`: bytes there are.

    `resident`: what the process holds already. `peak`: resident memory, with the matrix or phase that causes it; None
    where the work is done on another device.
    """

    payload: dict[str, int]
    disk: int
    free: int
    resident: int
    peak: Peak | None


def estimate(plan: Plan, out: Path) -> Estimate:
    """All figures for a plan whose output goes to `out`. Reads no weight."""
    forms = plan.recipe.export.forms
    untied = _untied_bytes(plan)
    before = plan.source.nbytes() + untied
    found = _stored(plan, plan.changes, written=True)
    payload = {"dense": before, "sparse": before - found.dense + found.packed}
    masks = found.masks if "dense" in forms else 0
    parts = sum(_parts(plan, stage) for stage in plan.changes)
    if not any(job.prunable.kind == "head" for stage in plan.changes for job in stage.jobs):
        parts += untied
    needs = [stage_kind(stage.stage.stage).needs(plan, stage) for stage in plan.stages]
    peak = max((need.peak for need in needs), key=lambda found: found.bytes)
    resident = memory.resident_bytes()
    return Estimate(
        payload={form: payload[form] for form in forms},
        disk=sum(payload[form] for form in forms) + masks + parts + max(need.disk for need in needs),
        free=memory.free_disk(out),
        resident=resident,
        peak=Peak(peak.bytes + resident, peak.cause) if torch.device(plan.device).type == "cpu" else None,
    )


def _parts(plan: Plan, stage: StagePlan) -> int:
    """What a stage that changes weights keeps until the checkpoint is assembled."""
    found = _stored(plan, [stage])
    return found.packed if stage.layerwise else plan.source.nbytes() - found.dense + found.packed


def check_room(found: Estimate, out: Path, present: int) -> None:
    """ResourceError when the disk below `out` clearly cannot take the run. `present`: bytes of its partial folder."""
    needed = found.disk - present
    if needed > found.free:
        raise ResourceError(
            f"{out} needs {needed / 1e9:.2f} GB of disk, {found.free / 1e9:.2f} GB are free",
            hint="free disk space, choose an output folder on another disk, or write one form only (--format)",
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass
class _Stored:
    """Bytes of matrices that get a mask: as they were, their masks, masks and kept values together."""

    dense: int = 0
    masks: int = 0
    packed: int = 0

    def add(self, size: int, zeros: int, columns: int, dtype: torch.dtype, int8: bool) -> None:
        rows = size // columns
        self.dense += size * dtype.itemsize
        self.masks += packed_bytes(rows, columns, 0, dtype, int8=False)
        self.packed += packed_bytes(rows, columns, size - zeros, dtype, int8=int8)


def _stored(plan: Plan, stages: Sequence[StagePlan], *, written: bool = False) -> _Stored:
    """All matrices of `stages`; where two name the same one, the later counts.

    `written`: as the checkpoint has them, and with them those that had a mask before. Parts have floats in any case.
    """
    int8 = written and plan.recipe.export.values == "int8"
    total = _Stored()
    zeros: dict[str, int] = defaultdict(int)
    columns: dict[str, int] = {}
    for job in {job.name: job for stage in stages for job in stage.jobs}.values():
        width = job.prunable.shape[1]
        if job.keys:
            zeros[job.keys[0]] += job.zeros
            columns |= dict.fromkeys(job.keys, width)
        else:  # a head that is not stored yet
            total.add(job.size, job.zeros, width, plan.skeleton.dtype, int8)
    for key, width in columns.items():
        meta = plan.source.meta(key)
        total.add(math.prod(meta.shape), zeros[key], width, meta.dtype, int8)
    for key, record in plan.source.records().items() if written else ():
        if key not in columns:
            dtype = plan.source.meta(key).dtype
            total.add(math.prod(record.shape), record.zeros, record.cols, dtype, int8)
    return total


def _untied_bytes(plan: Plan) -> int:
    """The head's own weight, where a stage unties it from the embedding."""
    head = plan.skeleton.head()
    untie = any(stage.untie for stage in plan.changes)
    if head is None or not untie or plan.skeleton.source_keys(head) or not plan.skeleton.head_is_tied:
        return 0
    return head.size * plan.skeleton.dtype.itemsize
