"""The finetune stage: the model as it stands is trained under its masks; none of its zeros is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RecipeError
from ...finetune.methods import Attached, get_method
from ...finetune.packing import apart
from ...finetune.spiel.method import Adapting, Ground
from .. import distributed
from ..jobs import MatrixJob, matrix_jobs
from ..needs import Needs
from ..plan import Plan, Planning
from ..prunable import Prunable
from ..quantisedbase import check_base, open_quantised, quantised_needs
from ..stage_recipes.finetune import FinetuneStage
from ..stage_recipes.training import TrainingStage
from ..training import (
    TrainingPlan,
    heldout_loss,
    metrics_entry,
    micro_tokens,
    retrainer,
    training_config,
    training_needs,
    training_plan,
)
from ..whole import kept_of, open_whole, write_matrices, write_whole
from .adapterchecks import masked_before, room_of
from .base import Context, StageReport

_COMMON = {*TrainingStage.model_fields, "stage", "method"}


@dataclass(frozen=True)
class FinetunePlan(TrainingPlan):
    """`targets`: all prunable matrices of the blocks, whether they have a mask or not."""

    stage: FinetuneStage
    jobs: tuple[MatrixJob, ...] = ()
    targets: tuple[Prunable, ...] = field(default=(), kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """In which a quantised base computes: that of the forward pass."""
        dtype: torch.dtype = getattr(torch, self.stage.precision)
        return dtype


class Finetune:
    """Training under the masks that there are."""

    def plan(self, index: int, stage: FinetuneStage, planning: Planning) -> FinetunePlan:
        """The text and what a method may adapt. RecipeError for an option that the method does not know."""
        method = get_method(stage.method)
        if stage.base_quant is not None and not method.beside:
            raise RecipeError(
                f"{stage.method} trains the weights themselves, and base_quant {stage.base_quant} freezes them in "
                f"{'8' if stage.base_quant == 'int8' else '4'} bits",
                hint="use a method that trains beside them: spiel-ag, spiel-ma, static or lora",
            )
        strange = sorted(stage.model_fields_set - _COMMON - method.reads)
        if strange:
            raise RecipeError(
                f"{', '.join(strange)} means nothing to fine-tuning method {stage.method}",
                hint=f"it knows {', '.join(sorted(method.reads)) or 'no options of its own'}",
            )
        if method.optimizers is not None and stage.optimizer not in method.optimizers:
            raise RecipeError(
                f"{stage.method} has an optimizer of its own; {stage.optimizer} means nothing to it",
                hint=f"optimizers that it knows: {', '.join(sorted(method.optimizers))}",
            )
        masked = masked_before(index, planning)
        if method.needs_masks and not masked:
            raise RecipeError(
                f"{stage.method} moves masks, and the model has none",
                hint="put a prune stage before it, or start from a sparse checkpoint",
            )
        if stage.learning_rate is None:
            stage = stage.model_copy(update={"learning_rate": method.learning_rate})
        model = planning.skeleton
        targets = tuple(p for i in range(model.num_blocks) for p in model.prunables(i))
        if stage.base_quant is not None:
            check_base(stage.base_quant, planning, targets)
        if isinstance(method, Adapting):
            linear = [target for target in targets if target.kind != "expert"]
            shapes = [target.shape for target in linear]
            method.check(stage.model_dump(), Ground(shapes, masked, room_of(index, planning, linear)))
        pattern = method.prunes(stage.model_dump())
        pruned = [target for target in targets if target.kind != "expert"]
        jobs = () if pattern is None else matrix_jobs(pattern, pruned, model)
        return FinetunePlan(index, stage, jobs=jobs, targets=targets, **training_plan(stage, planning))

    def needs(self, plan: Plan, stage: FinetunePlan) -> Needs:
        shapes = [target.shape for target in stage.targets]
        parameters = sum(rows * cols for rows, cols in shapes)
        share = get_method(stage.stage.method).share(parameters, shapes, stage.stage.model_dump())
        if stage.stage.base_quant is not None:
            return quantised_needs(
                plan, stage, stage.targets, stage.stage.base_quant, stage.dtype, share, micro_tokens(stage)
            )
        return training_needs(plan, stage, trained=share)

    def run(self, context: Context, stage: FinetunePlan) -> StageReport:
        started = time.monotonic()
        context.progress.working("open the model")
        model = _opened(context, stage)
        masks = kept_of(model)
        before = heldout_loss(model, stage)
        retrain = retrainer(context, stage)
        names = list(dict.fromkeys(target.parameter for target in stage.targets))
        method = get_method(stage.stage.method)
        options = stage.stage.model_dump() | {
            "steps": stage.steps,
            "stored": context.plan.skeleton.dtype,
            "base": _public_name(context.plan.model),
        }
        attached = method.attach(model, masks, names, options, context.plan.recipe.seed)
        for note in attached.notes:
            context.progress.note(note)
        config = training_config(context, stage, callbacks=attached.callbacks, make_optimizer=attached.make_optimizer)
        rows = apart(model, stage.text.train)
        if rows is not stage.text.train:
            context.progress.note("packed examples would see each other in this model: each has a row of its own")
        if attached.prepare is not None:
            attached.prepare(rows)
        metrics = retrain(model, config, attached.masks)
        files = _save(context, stage, attached)
        folder = context.part_folder(stage)
        if attached.merged is None:
            figures = attached.finish()
            kept = masks if attached.kept is None else attached.kept()
            after = heldout_loss(model, stage)
            distributed.on_main(lambda: write_whole(context, model, kept, attached.patterns, folder))
        else:
            after = heldout_loss(model, stage)  # beside the quantised weights: the merged ones are never in memory
            distributed.on_main(lambda: _write_merged(context, model, attached, masks, folder))
            figures = attached.finish()
            kept = masks if attached.kept is None else attached.kept()
        difference = after - before
        error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else None
        return StageReport(
            "finetune",
            stage.index,
            time.monotonic() - started,
            {
                "method": stage.stage.method,
                **({} if stage.stage.base_quant is None else {"base_quant": stage.stage.base_quant}),
                **figures,
                "zeros": sum(int((~mask).sum()) for mask in kept.values()),
                "heldout": {
                    "rows": len(before),
                    "before": float(before.mean()) if len(before) else None,
                    "after": float(after.mean()) if len(after) else None,
                    "standard_error": error,
                },
                "training": [metrics_entry(metrics)],
            },
            files=files,
        )


def _public_name(model: str) -> str:
    """What an adapter says of its base: an id as it is, of a folder the last name alone, as it may be passed on."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _opened(context: Context, stage: FinetunePlan) -> Any:
    kind = stage.stage.base_quant
    return open_whole(context) if kind is None else open_quantised(context, stage.targets, kind, stage.dtype)


def _write_merged(context: Context, model: Any, attached: Attached, masks: Mapping[str, Tensor], folder: Path) -> None:
    """Matrices that come one after the other, each under its mask as it is by then."""
    assert attached.merged is not None
    now, merged = dict(masks), attached.merged()

    def matrices() -> Iterator[tuple[str, Tensor]]:
        for name, matrix, mask in merged:
            if mask is not None:
                now[name] = mask
            yield name, matrix

    write_matrices(context, model, matrices(), now, folder)


def _save(context: Context, stage: FinetunePlan, attached: Attached) -> list[str]:
    """Writes the adapter, for OUT/gossamer/adapter-<number of the stage>/."""
    if attached.save is None:
        return []
    save, folder = attached.save, context.attachment(stage, f"adapter-{stage.index}")
    names = distributed.on_main(lambda: save(folder))
    return [str((folder / name).relative_to(context.work)) for name in names]
