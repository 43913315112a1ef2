"""Memory and disk that the prune stage needs."""

from __future__ import annotations

from collections import defaultdict

from ...pruning.registry import get_method
from ..jobs import MatrixJob
from ..needs import Needs, Peak, block_bytes, compute_dtype, held, hidden_bytes
from ..plan import Plan, PrunePlan
from ..sums import SLAB

MATRIX_COPIES = 4  # float32 tensors [out, in] alive while one matrix is solved
GRAM_COPIES = 2  # float32 tensors [in, in] beside the Gram matrix: a factor, an inverse


def prune_needs(plan: Plan, stage: PrunePlan) -> Needs:
    """Hidden states up to the limit, one block (two where the dense model runs beside it), and the statistics of one
    step of a block with the work on its largest matrix."""
    models = 2 if stage.windows is not None and _asymmetric(stage) else 1
    dtype = compute_dtype(plan)
    states = hidden_bytes(plan, stage, dtype, models)
    base = (models + 1) * block_bytes(plan, dtype.itemsize) + held(plan, states)
    jobs = defaultdict(list)
    for job in stage.jobs:
        jobs[job.prunable.block].append(job)
    peaks = [_solve_peak(stage, members) for members in jobs.values()]
    worst = max(peaks, key=lambda found: found.bytes)
    return Needs(Peak(base + worst.bytes, worst.cause), states - held(plan, states))


def _asymmetric(stage: PrunePlan) -> bool:
    return stage.stage.reconstruct or "target" in get_method(stage.stage.method).needs


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
