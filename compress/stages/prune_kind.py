"""The prune stage as the registry knows it: what it will do, what of it cannot be done, and its run."""

from __future__ import annotations

from ...errors import RecipeError
from ...pruning.pattern import parse_pattern
from ...pruning.registry import get_method
from .. import distributed
from ..jobs import left_out, matrix_jobs, select
from ..needs import Needs
from ..plan import Plan, Planning, PrunePlan, sequence_length
from ..recipe import DEFAULT_CALIBRATION
from ..stage_recipes.prune import PruneStage
from .base import Context, StageReport
from .prune import PruneRun
from .prune_needs import prune_needs


class Prune:
    """One-shot pruning, decoder block by decoder block."""

    def plan(self, index: int, stage: PruneStage, planning: Planning) -> PrunePlan:
        """Jobs and calibration windows. RecipeError or DataError for whatever does not fit."""
        model, texts = planning.skeleton, planning.texts
        method = get_method(stage.method)
        pattern = parse_pattern(stage.pattern_text, str(stage.scope or getattr(method, "scope", "row")))
        if stage.scope == "model" and stage.method != "magnitude":
            raise RecipeError(
                f"scope model is not possible with {stage.method}: its scores are comparable inside one matrix only",
                hint="use --method magnitude, or --allocation owl to spread the sparsity over the blocks",
            )
        chosen, excluded = select(stage, model)
        jobs = matrix_jobs(pattern, chosen, model)
        if stage.reconstruct and distributed.world() > 1:
            raise RecipeError(
                f"reconstruct trains on all windows in one process, and {distributed.world()} were started",
                hint="run the same command without a launcher",
            )
        windows = source = None
        needed = bool(method.needs) or stage.reconstruct or stage.allocation == "owl"
        if needed or stage.calibration is not None:
            data = stage.calibration or DEFAULT_CALIBRATION
            seqlen = sequence_length(stage.seqlen, model.max_positions, "--seqlen")
            windows, source = texts.calibration(data, stage.nsamples, seqlen)
        return PrunePlan(index, stage, jobs, left_out(model, excluded), windows, source)

    def needs(self, plan: Plan, stage: PrunePlan) -> Needs:
        return prune_needs(plan, stage)

    def run(self, context: Context, stage: PrunePlan) -> StageReport:
        return PruneRun(context, stage).run()
