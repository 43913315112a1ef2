"""The random-search baseline: several random sparse subnetworks share the steps; the best on held-out text stays."""

from __future__ import annotations

import time
from typing import Any

from ...pruning.random_search import best, random_masks, share
from .. import distributed
from ..needs import Needs
from ..plan import Plan, Planning
from ..stage_recipes.gradual import RandomStage
from ..training import heldout_loss, metrics_entry, retrainer, training_config, training_needs
from ..wholestate import whole_tensors, write_state
from .base import Context, StageReport
from .imp import mean
from .masked_model import Masked
from .targets import TargetPlan, target_plan


class RandomSearch:
    """Best of n random masks at the budget of one pruned model."""

    def plan(self, index: int, stage: RandomStage, planning: Planning) -> TargetPlan:
        found = target_plan(index, stage, planning)
        share(found.steps, stage.tries)
        return found

    def needs(self, plan: Plan, stage: TargetPlan) -> Needs:
        return training_needs(plan, stage)

    def run(self, context: Context, stage: TargetPlan) -> StageReport:
        started = time.monotonic()
        recipe = stage.stage
        assert isinstance(recipe, RandomStage)
        context.progress.working("open the model")
        masked = Masked(context, stage)
        folder = context.state_folder(stage)
        parent = folder / "parent.safetensors"
        distributed.on_main(lambda: parent.exists() or write_state(parent, whole_tensors(masked.model), masked.masks))
        retrain = retrainer(context, stage)
        entries: list[dict[str, Any]] = []
        for number in range(1, recipe.tries + 1):
            unit = f"{stage.name}/try-{number}"
            entry = context.journal.done(unit)
            if entry is None:
                masked.reopen(parent)
                seed = context.plan.recipe.seed + number - 1
                masked.set_masks(random_masks(masked.weights(), masked.matrix_masks(), stage.pattern, seed))
                steps = share(stage.steps, recipe.tries)
                config = training_config(context, stage, f"try-{number}", steps=steps, seed=seed)
                metrics = retrain(masked.model, config, masked.masks)
                loss = distributed.from_rank(mean(heldout_loss(masked.model, stage)), 0)
                masked.save(folder / f"try-{number}.safetensors")
                patterns = {name: sorted(texts) for name, texts in masked.patterns.items()}
                entry = {
                    "try": number, "seed": seed, "heldout_loss": loss, "patterns": patterns,
                    "training": metrics_entry(metrics, f"try-{number}"),
                }  # fmt: skip
                context.finish(unit, entry)
            entries.append(entry)
        chosen = best(entries)
        masked.restore(folder / f"try-{chosen + 1}.safetensors")
        masked.patterns = {name: set(texts) for name, texts in entries[chosen]["patterns"].items()}
        parts = context.part_folder(stage)
        masked.write(parts)
        result = {
            "tries": [{key: entry[key] for key in ("try", "seed", "heldout_loss")} for entry in entries],
            "chosen": chosen + 1,
            "heldout": entries[chosen]["heldout_loss"],
            "layers": masked.layers("random"),
            "training": [entry["training"] for entry in entries],
        }
        return StageReport("random", stage.index, time.monotonic() - started, result)
