"""The gradual stage: one training run in which the masks tighten along a cubic curve."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from ...finetune.tightening import Tightening
from ...pruning.gradual import Cubic
from ...pruning.imp import tighten
from ...pruning.pattern import Block, Pattern, Unstructured
from .. import distributed
from ..needs import Needs
from ..plan import Plan, Planning
from ..stage_recipes.gradual import GradualStage
from ..training import heldout_loss, metrics_entry, retrainer, training_config, training_needs
from .base import Context, StageReport
from .imp import mean
from .masked_model import Masked
from .targets import TargetPlan, target_plan


class Gradual:
    """Gradual magnitude pruning."""

    def plan(self, index: int, stage: GradualStage, planning: Planning) -> TargetPlan:
        """Jobs, text and curve."""
        found = target_plan(index, stage, planning)
        curve(found, 0.0)
        return found

    def needs(self, plan: Plan, stage: TargetPlan) -> Needs:
        return training_needs(plan, stage)

    def run(self, context: Context, stage: TargetPlan) -> StageReport:
        started = time.monotonic()
        context.progress.working("open the model")
        masked = Masked(context, stage)
        before = heldout_loss(masked.model, stage)
        config = training_config(context, stage)
        steps = curve(stage, masked.sparsity)

        def narrower(sparsity: float) -> Mapping[str, Tensor]:
            masked.take_masks(tighten(masked.weights(), masked.matrix_masks(), _at(stage.pattern, sparsity)))
            return masked.masks

        def restore(found: dict[str, Tensor]) -> None:
            for name, mask in found.items():
                masked.masks[name].copy_(mask)

        config.folder.mkdir(parents=True, exist_ok=True)
        callback = Tightening(steps, narrower, restore, config.folder, writes=distributed.is_main())
        config = training_config(context, stage, callbacks=(callback,))
        metrics = retrainer(context, stage)(masked.model, config, masked.masks)
        # After the last tightening nothing changes; this finds the same masks, and their names for the report.
        masked.set_masks(tighten(masked.weights(), masked.matrix_masks(), stage.pattern))
        after = heldout_loss(masked.model, stage)
        folder = context.part_folder(stage)
        masked.write(folder)
        result = {
            "begin": steps.begin, "end": steps.end, "every": steps.every,
            "heldout_dense": mean(before), "heldout": mean(after),
            "layers": masked.layers("gradual"),
            "training": [metrics_entry(metrics)],
        }  # fmt: skip
        return StageReport("gradual", stage.index, time.monotonic() - started, result)


def curve(plan: TargetPlan, initial: float) -> Cubic:
    """The schedule over the stage's optimizer steps. RecipeError when less is asked for than is pruned already."""
    stage = plan.stage
    assert isinstance(stage, GradualStage)
    begin, end = round(stage.begin * plan.steps), max(1, round(stage.end * plan.steps))
    return Cubic(plan.pattern.sparsity, min(begin, end), end, stage.every, plan.initial(initial))


def _at(pattern: Pattern, sparsity: float) -> Pattern:
    if isinstance(pattern, Block):
        return Block(pattern.rows, pattern.cols, sparsity)
    assert isinstance(pattern, Unstructured)
    return Unstructured(sparsity, pattern.scope)
