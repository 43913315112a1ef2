"""The nm-flow stage: the whole model is trained while its matrices approach their N:M patterns."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import RecipeError
from ...finetune.flow_steps import FlowSteps
from ...pruning.flow import Flow, FlowMatrix, FlowOptions
from ...pruning.flow_schedule import FlowSchedule
from ...pruning.mask import Mask
from ...pruning.pattern import NM, parse_pattern
from .. import distributed
from ..jobs import MatrixJob, check_shapes, left_out, select
from ..needs import Needs
from ..plan import Plan, Planning
from ..prunable import Prunable, owner_of, stored_transposed
from ..stage_recipes.nm_flow import DENSE, NmFlowStage
from ..training import (
    TrainingPlan,
    heldout_loss,
    metrics_entry,
    retrainer,
    training_config,
    training_needs,
    training_plan,
)
from ..whole import kept_of, matrix_in, open_whole, write_whole
from .base import Context, StageReport


@dataclass(frozen=True)
class NmFlowPlan(TrainingPlan):
    """A stage that trains towards N:M."""

    stage: NmFlowStage


class NmFlow:
    """Progressive gradient flow for N:M."""

    def plan(self, index: int, stage: NmFlowStage, planning: Planning) -> NmFlowPlan:
        """A job for every matrix, and the text. RecipeError for a pattern that does not divide, all at once."""
        model = planning.skeleton
        chosen, excluded = select(stage, model)
        patterns, dense = _patterns(stage, chosen)
        for pattern in dict.fromkeys(patterns.values()):
            check_shapes(pattern, [prunable for prunable in chosen if patterns.get(prunable.name) == pattern])
        jobs = tuple(
            MatrixJob(prunable, patterns[prunable.name], tuple(model.source_keys(prunable)))
            for prunable in chosen
            if prunable.name in patterns
        )
        if not jobs:
            raise RecipeError(
                "nothing is left to prune", hint="check patterns, include and exclude; `gossamer inspect` lists names"
            )
        _check_stacks(jobs, [p for i in range(model.num_blocks) for p in model.prunables(i)])
        skipped = (*left_out(model, excluded), *((name, "dense by `patterns`") for name in dense))
        found = training_plan(stage, planning)
        options = options_of(stage, found["steps"])
        for pattern, cols in dict.fromkeys((patterns[job.name], job.prunable.shape[1]) for job in jobs):
            FlowSchedule(options.kind, pattern, cols, options.steps, options.tail, options.decay)
        return NmFlowPlan(index, stage, jobs, skipped, **found)

    def needs(self, plan: Plan, stage: NmFlowPlan) -> Needs:
        """Beside what training needs, the masked weights that the forward pass computes with."""
        return training_needs(plan, stage, models=2)

    def run(self, context: Context, stage: NmFlowPlan) -> StageReport:
        started = time.monotonic()
        context.progress.working("open the model")
        model = open_whole(context)
        before = heldout_loss(model, stage)
        so_far = kept_of(model)
        flow = Flow(flow_matrices(model, stage.jobs), options_of(stage.stage, stage.steps), model)
        for note in left_out_notes(flow):
            context.progress.note(note)
        others = {name: mask for name, mask in so_far.items() if name not in flow.matrices}
        config = training_config(context, stage, callbacks=(FlowSteps(flow),))
        metrics = retrainer(context, stage)(model, config, others)
        masks = flow.finish()
        kept = others | {name: _shaped(mask, flow.matrices[name]) for name, mask in masks.items()}
        after = heldout_loss(model, stage)
        folder = context.part_folder(stage)
        patterns = {name: mask.pattern for name, mask in masks.items()}
        distributed.on_main(lambda: write_whole(context, model, kept, patterns, folder))
        rows = [_row(job, matrix_in(kept, model, job.prunable), stage.stage.flow) for job in stage.jobs]
        sparsity = sum(row["zeros"] for row in rows) / sum(job.size for job in stage.jobs)
        result = {
            "flow": stage.stage.flow,
            "layers": rows,
            "heldout": {"rows": len(before), "before": _mean(before), "after": _mean(after)},
            "training": [metrics_entry(replace(metrics, sparsity=sparsity))],
        }
        return StageReport("nm-flow", stage.index, time.monotonic() - started, result)


def options_of(stage: NmFlowStage, steps: int) -> FlowOptions:
    """The stage's fields as the leaf takes them."""
    straight = None if stage.gradient is None else stage.gradient == "straight"
    return FlowOptions(stage.flow, steps, stage.tail, stage.decay, straight, stage.shrink, stage.decoupled)


def flow_matrices(model: Any, jobs: Iterable[MatrixJob]) -> dict[str, FlowMatrix]:
    """Parameter name -> how it is trained; a stack of experts is one parameter."""
    found = {}
    for job in jobs:
        name = job.prunable.parameter
        if name in found:
            continue
        owner = owner_of(model, "", job.prunable)
        transposed = stored_transposed(job.prunable, owner)
        before = model.gossamer_masks.get(name)
        allowed = None if before is None else Mask(before.bits, job.prunable.shape[1], before.pattern)
        assert isinstance(job.pattern, NM)
        found[name] = FlowMatrix(owner, job.pattern, transposed, name.rpartition(".")[2], allowed)
    return found


def left_out_notes(flow: Flow) -> list[str]:
    """One sentence for every frame that some matrices go without."""
    names: dict[tuple[NM, int], list[str]] = {}
    for name, frame in flow.left_out:
        names.setdefault((frame, flow.weights[name].schedule.cols), []).append(name.removesuffix(".weight"))
    return [
        f"frame {frame} is left out of {found[0]}"
        + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        + f": {cols} inputs are not a multiple of {frame.group}"
        for (frame, cols), found in names.items()
    ]


def _patterns(stage: NmFlowStage, chosen: Sequence[Prunable]) -> tuple[dict[str, NM], list[str]]:
    """(matrix name -> its pattern, names of those that stay dense)."""
    names = [prunable.name for prunable in chosen]
    for regex in stage.patterns:
        if not any(re.search(regex, name) for name in names):
            raise RecipeError(f"patterns: {regex!r} matches no matrix", hint=f"names look like {', '.join(names[:3])}")
    found, dense = {}, []
    for name in names:
        text = next((text for regex, text in stage.patterns.items() if re.search(regex, name)), stage.pattern)
        if text == DENSE:
            dense.append(name)
            continue
        pattern = parse_pattern(text)
        assert isinstance(pattern, NM)
        found[name] = pattern
    return found, dense


def _check_stacks(jobs: Sequence[MatrixJob], every: Sequence[Prunable]) -> None:
    """RecipeError unless all experts of one parameter go the same way: they are one tensor."""
    patterns: dict[str, set[str]] = {}
    for job in jobs:
        patterns.setdefault(job.prunable.parameter, set()).add(str(job.pattern))
    named = {job.name for job in jobs}
    for prunable in every:
        found = patterns.get(prunable.parameter)
        if found and (len(found) > 1 or prunable.name not in named):
            raise RecipeError(
                f"the experts of {prunable.parameter} are one tensor and can have only one pattern between them",
                hint="let patterns, include and exclude match all of its experts or none",
            )


def _shaped(mask: Mask, matrix: FlowMatrix) -> Tensor:
    """The mask in the parameter's shape and place."""
    shape = matrix.weight.shape
    keep = mask.to_bool().to(matrix.weight.device)
    return keep.view(*shape[:-2], shape[-1], shape[-2]).mT if matrix.transposed else keep.view(shape)


def _row(job: MatrixJob, keep: Tensor, flow: str) -> dict[str, Any]:
    zeros = int((~keep).sum())
    return {
        "name": job.name,
        "shape": list(job.prunable.shape),
        "pattern": str(job.pattern),
        "method": flow,
        "zeros": zeros,
        "sparsity": round(zeros / keep.numel(), 6),
        "tokens": None,
        "error_before": None,
        "error_after": None,
        "seconds": None,
    }


def _mean(losses: torch.Tensor) -> float | None:
    return float(losses.mean()) if len(losses) else None
