"""How the sparsity of a prune stage is spread over its matrices: uniform, OWL, or one threshold for the whole model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ...pruning.allocation import global_counts, owl, pooled_outlier_share
from ...pruning.pattern import Pattern, Unstructured
from .. import distributed, memory
from ..blocks import StreamedModel
from ..calibration import collect
from ..evaluate import capture, propagate
from ..hidden import HiddenStore
from ..plan import PrunePlan
from .base import Context

OWL_MULTIPLE = 5.0  # an outlier is an entry of |W| x above this multiple of the mean (paper, LLaMA-1)
OWL_SPAN = 0.08  # lambda: half of the widest difference in density between two blocks


def budgets(context: Context, plan: PrunePlan, model: StreamedModel) -> dict[str, Pattern]:
    """The pattern of every matrix. Found once: the journal keeps the counts for a resumed run."""
    stage = plan.stage
    patterns = {job.name: job.pattern for job in plan.jobs}
    if stage.allocation != "owl" and stage.scope != "model":
        return patterns
    unit = f"{plan.name}/budget"
    done = context.journal.done(unit)
    if done is None:
        context.progress.stage("spread the sparsity", model.num_blocks)
        counts = _owl(context, plan, model) if stage.allocation == "owl" else _global(plan, model)
        done = {"zeros": counts}
        context.finish(unit, done)
    sizes = {job.name: job.size for job in plan.jobs}
    scope = "matrix" if stage.scope == "model" else stage.scope or "row"
    return {name: Unstructured(zeros / sizes[name], scope) for name, zeros in done["zeros"].items()}


def _global(plan: PrunePlan, model: StreamedModel) -> dict[str, int]:
    """Exact zeros per matrix of one magnitude threshold over all matrices (ties by matrix order)."""
    names = [job.name for job in plan.jobs]
    total = sum(job.size for job in plan.jobs)
    pattern = plan.jobs[0].pattern
    counts = global_counts(lambda: _magnitudes(plan, model), round(pattern.sparsity * total))
    return dict(zip(names, counts, strict=True))


def _magnitudes(plan: PrunePlan, model: StreamedModel) -> Iterator[Tensor]:
    """|w| of every job, float32, in job order; one block in memory."""
    for index in range(model.num_blocks):
        block = model.load_block(index)
        for job in plan.jobs:
            if job.prunable.block == index:
                yield model.weight(block, job.prunable).float().abs()
        del block
        memory.release()


def _owl(context: Context, plan: PrunePlan, model: StreamedModel) -> dict[str, int]:
    """Zeros per matrix from the outlier share of its block on the dense model (OWL, ICML 2024)."""
    assert plan.windows is not None
    hidden = HiddenStore(context.scratch / f"owl-{distributed.rank()}", context.plan.machine.max_memory_bytes // 2)
    try:
        args = capture(model, plan.windows, hidden)
        shares, sizes = [], []
        for index in range(model.num_blocks):
            block = model.load_block(index)
            jobs = {job.name: job for job in plan.jobs if job.prunable.block == index}
            groups = model.input_groups(index, block, hidden.get(0), args)
            groups = [[member for member in group if member.name in jobs] for group in groups]
            groups = [group for group in groups if group]
            norms = collect(model, index, block, None, groups, hidden, None, args, frozenset(), len(plan.windows))
            pooled = [
                (model.weight(block, job.prunable).float(), norms[name].norm / max(norms[name].tokens, 1) ** 0.5)
                for name, job in jobs.items()
            ]
            shares.append(pooled_outlier_share(pooled, OWL_MULTIPLE) if pooled else 0.0)
            sizes.append(sum(job.size for job in jobs.values()))
            propagate(model, index, block, hidden, args, len(plan.windows))
            del block
            memory.release()
    finally:
        hidden.close()
    sparsities = owl(shares, sizes, plan.jobs[0].pattern.sparsity, OWL_SPAN)
    return {job.name: round(sparsities[job.prunable.block] * job.size) for job in plan.jobs}
