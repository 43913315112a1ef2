"""The plan of a training stage that prunes: its matrices, its text, and the pattern of its end."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import RecipeError
from ...pruning.imp import phase_rate
from ...pruning.pattern import Pattern, Unstructured, parse_pattern
from ..jobs import left_out, matrix_jobs, select
from ..plan import Planning
from ..stage_recipes.target import TargetStage
from ..training import TrainingPlan, training_plan

ROUNDING = 0.005  # a whole number of zeros per row may exceed the sparsity that was asked for by this much


@dataclass(frozen=True)
class TargetPlan(TrainingPlan):
    """A training stage that prunes: `pattern` is that of its end."""

    stage: TargetStage
    pattern: Pattern = field(kw_only=True)

    def check_before(self, pruned: float) -> None:
        phase_rate(self.pattern.sparsity, 1, self.initial(pruned))

    def initial(self, pruned: float) -> float:
        """The sparsity to begin with when `pruned` of the weights are: more than the target only if that is a mistake.

        Groups and blocks may be fuller than their pattern, and rows are rounded.
        """
        target = self.pattern.sparsity
        more = pruned - target
        return target if more > 0 and (more < ROUNDING or not isinstance(self.pattern, Unstructured)) else pruned


def target_plan(index: int, stage: TargetStage, planning: Planning) -> TargetPlan:
    """Jobs, text and pattern. RecipeError or DataError for what does not fit."""
    pattern = parse_pattern(stage.pattern_text, stage.unit)
    chosen, excluded = select(stage, planning.skeleton)
    head = [prunable for prunable in chosen if prunable.kind == "head"]
    if head:
        raise RecipeError(
            f"{head[0].name} is not pruned by stage {stage.stage}", hint="leave --include of the head to a prune stage"
        )
    jobs = matrix_jobs(pattern, chosen, planning.skeleton)
    skipped = left_out(planning.skeleton, excluded)
    return TargetPlan(index, stage, jobs, skipped, pattern=pattern, **training_plan(stage, planning))


def phase_steps(total: int, phases: int) -> list[int]:
    """`total` optimizer steps over the phases. RecipeError when one would have none."""
    if total < phases:
        raise RecipeError(
            f"{total} steps are too few for {phases} phases",
            hint="give more --tokens or --steps, or --set phases=... for fewer phases",
        )
    return [total * (p + 1) // phases - total * p // phases for p in range(phases)]
