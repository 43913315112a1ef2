"""What a run will need and write, from shapes alone: bytes of the output, disk, and the peak of resident memory.

Bytes are exact. Memory is an estimate, from what each phase holds at once (docs/log.md has measured peaks beside it):
what the process holds already, hidden states up to the limit, one block (two where the dense model runs beside it), and
either the statistics of one step of a block with the work on its largest matrix, or the logits of one window.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ResourceError
from ..pruning.registry import get_method
from . import memory
from .format import packed_bytes
from .plan import EvaluatePlan, MatrixJob, Plan, PrunePlan, evaluation_dtype
from .sums import SLAB

LOGITS = 4  # float32 tensors [window, vocabulary] alive at once while two models are compared
MATRIX_COPIES = 4  # float32 tensors [out, in] alive while one matrix is solved
GRAM_COPIES = 2  # float32 tensors [in, in] beside the Gram matrix: a factor, an inverse


@dataclass(frozen=True)
class Peak:
    """Bytes, and what they are for."""

    bytes: int
    cause: str


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
    found = _stored(plan, plan.prunes, written=True)
    payload = {"dense": before, "sparse": before - found.dense + found.packed}
    masks = found.masks if "dense" in forms else 0
    parts = sum(_stored(plan, [stage]).packed for stage in plan.prunes)
    if not any(job.prunable.kind == "head" for stage in plan.prunes for job in stage.jobs):
        parts += untied
    peaks = [_prune_peak(plan, s) if isinstance(s, PrunePlan) else _evaluate_peak(plan, s) for s in plan.stages]
    peak = max(peaks, key=lambda found: found.bytes)
    resident = memory.resident_bytes()
    spilled = max(_spilled(plan, stage) for stage in plan.stages)
    return Estimate(
        payload={form: payload[form] for form in forms},
        disk=sum(payload[form] for form in forms) + masks + parts + spilled,
        free=memory.free_disk(out),
        resident=resident,
        peak=Peak(peak.bytes + resident, peak.cause) if torch.device(plan.device).type == "cpu" else None,
    )


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


def _stored(plan: Plan, stages: list[PrunePlan], *, written: bool = False) -> _Stored:
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
    untie = any(stage.stage.untie for stage in plan.prunes)
    if head is None or not untie or plan.skeleton.source_keys(head) or not plan.skeleton.head_is_tied:
        return 0
    return head.size * plan.skeleton.dtype.itemsize


def _spilled(plan: Plan, stage: PrunePlan | EvaluatePlan) -> int:
    """Hidden states that do not fit under the limit."""
    if stage.windows is None:
        return 0
    total = _states(plan, stage)
    return max(0, total - plan.machine.max_memory_bytes // 2)


def _states(plan: Plan, stage: PrunePlan | EvaluatePlan) -> int:
    """Bytes of the hidden states of all windows, of both models where both run."""
    if stage.windows is None:
        return 0
    twice = 2 if isinstance(stage, EvaluatePlan) or _asymmetric(stage) else 1
    size = _compute(plan, stage).itemsize
    return twice * stage.windows.numel() * _width(plan) * size


def _asymmetric(stage: PrunePlan) -> bool:
    return stage.stage.reconstruct or "target" in get_method(stage.stage.method).needs


def _compute(plan: Plan, stage: PrunePlan | EvaluatePlan) -> torch.dtype:
    if isinstance(stage, EvaluatePlan):
        return evaluation_dtype(plan.machine)
    name = plan.machine.dtype
    return plan.skeleton.dtype if name == "auto" else getattr(torch, name)


def _width(plan: Plan) -> int:
    return int(plan.skeleton.config.get_text_config().hidden_size)


def _block_bytes(plan: Plan, itemsize: int) -> int:
    model = plan.skeleton
    sizes = [
        sum(math.prod(plan.source.meta(key).shape) for key in model.block_keys(i)) for i in range(model.num_blocks)
    ]
    return max(sizes) * itemsize


def _outer_bytes(plan: Plan, itemsize: int) -> int:
    return sum(math.prod(plan.source.meta(key).shape) for key in plan.skeleton.outer_keys()) * itemsize


def _held(plan: Plan, stage: PrunePlan | EvaluatePlan) -> int:
    return min(_states(plan, stage), plan.machine.max_memory_bytes // 2)


def _evaluate_peak(plan: Plan, stage: EvaluatePlan) -> Peak:
    itemsize = _compute(plan, stage).itemsize
    length = stage.windows.shape[1]
    logits = LOGITS * length * plan.skeleton.vocab_size * 4
    head = Peak(
        _outer_bytes(plan, itemsize) + logits, f"evaluation: logits of {length} tokens x {plan.skeleton.vocab_size}"
    )
    block = Peak(2 * _block_bytes(plan, itemsize), "evaluation: one decoder block")
    largest = max(head, block, key=lambda found: found.bytes)
    return Peak(largest.bytes + _held(plan, stage), largest.cause)


def _prune_peak(plan: Plan, stage: PrunePlan) -> Peak:
    blocks = 2 if stage.windows is not None and _asymmetric(stage) else 1
    base = (blocks + 1) * _block_bytes(plan, _compute(plan, stage).itemsize) + _held(plan, stage)
    jobs = defaultdict(list)
    for job in stage.jobs:
        jobs[job.prunable.block].append(job)
    peaks = [_solve_peak(stage, members) for members in jobs.values()]
    worst = max(peaks, key=lambda found: found.bytes)
    return Peak(base + worst.bytes, worst.cause)


def _solve_peak(stage: PrunePlan, jobs: list[MatrixJob]) -> Peak:
    """Statistics of the block's inputs and the work on the matrix that needs most."""
    method = get_method(stage.stage.method)
    needs = method.needs | {"gram"} if stage.windows is not None else frozenset()
    groups = _groups(jobs)
    kept = [_statistics(group, needs, 4) for group in groups]
    sums = [_statistics(group, needs, 8) for group in groups]
    work = {job.name: _work(job, method.needs) for job in jobs}
    worst = max(work, key=lambda name: work[name])
    together = sum if method.order == "block" else max
    bytes_ = max(together(sums), together(kept) + work[worst])
    rows, columns = next(job.prunable.shape for job in jobs if job.name == worst)
    return Peak(bytes_, f"{worst} ({rows} x {columns})")


def _groups(jobs: list[MatrixJob]) -> list[list[MatrixJob]]:
    """Matrices that probably share an input: same parent and width; of three or more the last stands alone."""
    found: dict[tuple[str, int], list[MatrixJob]] = defaultdict(list)
    for job in jobs:
        parent = job.name if job.prunable.kind == "expert" else job.name.rpartition(".")[0]
        found[parent, job.prunable.shape[1]].append(job)
    groups: list[list[MatrixJob]] = []
    for members in found.values():
        groups += [members] if len(members) < 3 else [members[:-1], members[-1:]]
    return groups


def _statistics(group: list[MatrixJob], needs: frozenset[str], itemsize: int) -> int:
    """Gram matrix (half of it while it is summed) and targets of one input."""
    if "gram" not in needs:
        return 0
    width = group[0].prunable.shape[1]
    gram = width * width * 4 + SLAB * width * 4
    if "target" not in needs or group[0].prunable.kind == "expert":
        return gram
    outputs = sum(job.prunable.shape[0] for job in group)
    targets = outputs * width * 4 if itemsize == 4 else width * min(width, outputs) * 8
    return gram + targets + outputs * width * 4


def _work(job: MatrixJob, needs: frozenset[str]) -> int:
    rows, columns = job.prunable.shape
    grams = GRAM_COPIES * columns * columns * 4 if "gram" in needs else 0
    return MATRIX_COPIES * rows * columns * 4 + grams
