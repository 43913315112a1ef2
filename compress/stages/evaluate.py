"""The evaluate stage: perplexity of the dense model and of the model so far, on the same windows."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from ...errors import ModelError
from ..activation.file import read_file
from ..activation.heldout import heldout
from ..attachments import entries
from ..evaluate import compare, run_by_plan
from ..needs import Needs, evaluation_needs
from ..plan import EvaluatePlan, Plan, Planning, evaluation_dtype, sequence_length
from ..report import evaluation_entry
from ..stage_recipes.evaluate import EvaluateStage
from .base import Context, StageReport


class Evaluate:
    """Perplexity and KL to the dense model."""

    def plan(self, index: int, stage: EvaluateStage, planning: Planning) -> EvaluatePlan:
        """Windows and protocol. Without a length of its own the stage takes that of the first stage that has one."""
        lengths = (getattr(s, "seqlen", None) for s in planning.recipe.stages if not isinstance(s, EvaluateStage))
        given = stage.seqlen or next((length for length in lengths if length), None)
        option = "--eval-seqlen" if stage.seqlen else "--seqlen"
        seqlen = sequence_length(given, planning.skeleton.max_positions, option)
        dtype = evaluation_dtype(planning.machine)
        windows, protocol, digest = planning.texts.evaluation(stage.data, seqlen, stage.windows, dtype)
        return EvaluatePlan(index, stage, windows=windows, protocol=protocol, text_digest=digest)

    def needs(self, plan: Plan, stage: EvaluatePlan) -> Needs:
        return evaluation_needs(plan, stage)

    def run(self, context: Context, stage: EvaluatePlan) -> StageReport:
        """The dense model against what would be written now. ModelError when the dense model has no finite loss."""
        started = time.monotonic()
        dtype = evaluation_dtype(context.plan.machine)
        model = context.open(context.written(), dtype, untie=context.untied)
        plan = run_by_plan(model, _head_plan(context))
        comparison = compare(
            context.open(context.plan.source, dtype),
            model,
            stage.windows,
            memory_bytes=context.plan.machine.max_memory_bytes // 2,
            progress=context.progress,
            scratch=context.scratch,
            same_head=not context.head_changed,
        )
        if not math.isfinite(comparison.before.cross_entropy):
            raise ModelError(
                "the dense model's loss is not finite", hint="try --dtype float32, or check the checkpoint"
            )
        entry = evaluation_entry(comparison, stage.protocol)
        if plan is not None:
            entry["head_plan"] = plan
            context.progress.note(f"the perplexity after is that of the model with its head plan ({plan})")
        skipped = _decode(context, stage, dtype)
        if skipped is not None:
            entry["activation"] = skipped
            if plan is not None:
                context.progress.note("the perplexity at decode is that of the activation policy without the head plan")
        return StageReport("evaluate", stage.index, time.monotonic() - started, entry)


def _head_plan(context: Context) -> dict[str, Any] | None:
    """The head plan that the checkpoint will have: of an earlier stage, else the model's own."""
    made = next((report for report in reversed(context.attached) if report.kind == "heads"), None)
    return entries(context.plan.source.config).get("heads") if made is None else made.entry


def _decode(context: Context, stage: EvaluatePlan, dtype: torch.dtype) -> dict[str, Any] | None:
    """The same windows under the activation policy that an earlier stage made, if one did."""
    made = next((report for report in context.attached if report.kind == "activation"), None)
    if made is None:
        return None
    return heldout(
        context.open(context.plan.source, dtype),
        context.open(context.written(), dtype, untie=context.untied),
        read_file(context.work / made.files[0]),
        stage.windows,
        memory_bytes=context.plan.machine.max_memory_bytes // 2,
        scratch=context.scratch,
        progress=context.progress,
    )
