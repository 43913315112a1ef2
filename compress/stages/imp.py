"""The imp stage: iterative pruning with retraining."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import RecipeError
from ...finetune.schedules import Rates
from ...pruning.imp import Phase
from ...pruning.registry import get_method
from ..needs import Needs
from ..plan import Plan, Planning
from ..stage_recipes.imp import ImpStage
from ..training import heldout_loss, metrics_entry, retrainer, training_config, training_needs
from .base import Context, StageReport
from .masked_model import Masked
from .phases import PhasedRun
from .targets import TargetPlan, phase_steps, target_plan

PHASE_SEED = 1_000_003  # every phase sees the text in another order


class Imp:
    """P phases: prune the same part of what remains, retrain with a fresh optimizer."""

    def plan(self, index: int, stage: ImpStage, planning: Planning) -> TargetPlan:
        """Jobs, text, and calibration windows where the score needs some. RecipeError for windows nobody looks at."""
        found = target_plan(index, stage, planning)
        phase_steps(found.steps, stage.phases)
        if not get_method(stage.score).needs:
            given = "calibration", stage.calibration
            if stage.nsamples != type(stage).model_fields["nsamples"].default:
                given = "nsamples", str(stage.nsamples)
            if given[1] is not None:
                raise RecipeError(
                    f"score {stage.score} looks at no text, and {given[0]} {given[1]} is given",
                    hint="leave it out, or choose a score that measures: --set score=wanda",
                )
            return found
        windows, source = planning.texts.calibration(
            stage.calibration or stage.data, stage.nsamples, found.text.train.length
        )
        return replace(found, windows=windows, calibration=source)

    def needs(self, plan: Plan, stage: TargetPlan) -> Needs:
        return training_needs(plan, stage)

    def run(self, context: Context, stage: TargetPlan) -> StageReport:
        assert isinstance(stage.stage, ImpStage)
        steps = phase_steps(stage.steps, stage.stage.phases)
        retrain = retrainer(context, stage)

        def phase(masked: Masked, phase: Phase, rates: Rates) -> dict[str, Any]:
            before = heldout_loss(masked.model, stage)
            name = f"phase-{phase.number}"
            config = training_config(
                context, stage, name, steps=steps[phase.number - 1], rates=rates, seed=phase_seed(context, phase.number)
            )
            metrics = retrain(masked.model, config, masked.masks)
            after = heldout_loss(masked.model, stage)
            figures = {"heldout_pruned": mean(before), "heldout": mean(after)}
            return {**figures, "training": [metrics_entry(metrics, name)]}

        return PhasedRun(context, stage, phase).run()


def phase_seed(context: Context, number: int) -> int:
    """The order of the text in a phase."""
    return (context.plan.recipe.seed + PHASE_SEED * (number - 1)) % 2**63


def mean(losses: Any) -> float | None:
    """Mean of losses per row; None where nothing was held out."""
    return float(losses.double().mean()) if len(losses) else None
