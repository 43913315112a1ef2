"""The evaluate stage: perplexity of the dense model and of the model so far, on the same windows."""

from __future__ import annotations

import math
import time

from ...errors import ModelError
from ..evaluate import compare
from ..plan import EvaluatePlan, evaluation_dtype
from ..report import evaluation_entry
from .base import Context, StageReport


def run_evaluate(context: Context, plan: EvaluatePlan) -> StageReport:
    """Compare the dense model with what would be written now. ModelError when the dense model has no finite loss."""
    started = time.monotonic()
    dtype = evaluation_dtype(context.plan.machine)
    comparison = compare(
        context.open(context.plan.source, dtype),
        context.open(context.written(), dtype, untie=context.untied),
        plan.windows,
        memory_bytes=context.plan.machine.max_memory_bytes // 2,
        progress=context.progress,
        scratch=context.scratch,
        same_head=not context.head_changed,
    )
    if not math.isfinite(comparison.before.cross_entropy):
        raise ModelError("the dense model's loss is not finite", hint="try --dtype float32, or check the checkpoint")
    seconds = time.monotonic() - started
    return StageReport("evaluate", plan.index, seconds, evaluation_entry(comparison, plan.protocol))
