"""What stages that train share: their plan, their text, and `train` with everything of the run filled in.

def plan(self, index, stage, planning):  return TrainingPlan(index, stage, jobs, **training_plan(stage, planning))
def run(self, context, plan):
    model = open_whole(context)
    retrain = retrainer(context, plan)                          # (model, config, masks=None) -> Metrics
    metrics = retrain(model, training_config(context, plan), kept_of(model, plan.jobs))
    write_whole(...); return StageReport(..., result={"training": [metrics_entry(metrics)]})
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import TrainingError
from ..finetune.losses import LossConfig, row_losses
from ..finetune.packing import apart
from ..finetune.tokens import TokenRows
from ..finetune.training import Metrics, Retrain, StepDone, TrainingConfig, train
from . import distributed
from .needs import Needs, whole_needs
from .plan import Plan, Planning, StagePlan, sequence_length
from .stage_recipes.training import TrainingStage
from .stages.base import Context
from .teacher import check_teacher, open_teacher
from .text import TextSource
from .traindata import TrainingText

HELDOUT_ROWS = 128  # at most so many held-out rows are measured


@dataclass(frozen=True)
class TrainingPlan(StagePlan):
    """A stage that trains. `text`: its rows; `steps`: optimizer steps of one run over `text.train`."""

    stage: TrainingStage
    text: TrainingText = field(compare=False, kw_only=True)
    steps: int = field(kw_only=True)

    @property
    def digest(self) -> str:
        return self.text.digest

    @property
    def said(self) -> str:
        rows, length = self.stage.batch, self.text.train.length
        tokens = f"{self.steps * rows * length:,} tokens"
        return f"{self.steps:,} steps of {rows} x {length} tokens ({tokens}) on {self.text.name}: {self.text.protocol}"


def training_plan(stage: TrainingStage, planning: Planning) -> dict[str, Any]:
    """The arguments of a TrainingPlan beyond its jobs. DataError or RecipeError for a text that does not fit."""
    length = sequence_length(stage.seqlen, planning.skeleton.max_positions, "--seqlen")
    steps = stage.count_steps(length)
    check_teacher(stage, planning, length)
    text = planning.texts.training(stage.data, length, stage.heldout, steps * stage.batch * length)
    source = TextSource(text.name, text.protocol, text.digest)
    return {"text": text, "steps": steps, "calibration": source}


def training_config(context: Context, plan: TrainingPlan, part: str = "", **changes: Any) -> TrainingConfig:
    """The stage's fields as a TrainingConfig that goes on after a kill.

    `part`: a name for each of several runs of one stage (phase-1, candidate-3): checkpoints in a folder of its own, and
    shown beside the progress. `changes`: other fields of TrainingConfig.
    """
    stage = plan.stage
    found: dict[str, Any] = {
        "folder": context.state_folder(plan) / (part or "run"),
        "steps": plan.steps,
        "seed": context.plan.recipe.seed,
        "loss": LossConfig(stage.loss, stage.temperature, stage.share, stage.hidden),
        "resume": True,
        "progress": reporter(context, " ".join([stage.stage, *part.split("-")]).strip()),
    }
    same = (
        "learning_rate", "schedule", "warmup", "optimizer", "momentum", "weight_decay", "batch", "accumulation", "clip",
        "precision", "gradient_checkpointing", "save_every", "log_every",
    )  # fmt: skip
    found |= {name: getattr(stage, name) for name in same}
    return TrainingConfig(**(found | changes))


def reporter(context: Context, label: str) -> Any:
    """What tells the watcher about steps."""

    def tell(event: StepDone) -> None:
        context.progress.step(label, event)

    return tell


def retrainer(context: Context, plan: TrainingPlan, teacher: Any | None = None) -> Retrain:
    """`train` on the stage's rows. Where the loss needs a teacher and none is given, it is the stage's."""
    if teacher is None and plan.stage.needs_teacher:
        teacher = open_teacher(context, plan.stage)

    def retrain(model: Any, config: TrainingConfig, masks: Any = None) -> Metrics:
        with torch.enable_grad(), distributed.shared(TrainingError):
            rows = apart(model, plan.text.train)
            if teacher is not None:
                rows = apart(teacher, rows)
            return train(model, config, masks, data=rows, teacher=teacher)

    return retrain


def heldout_rows(plan: TrainingPlan, model: Any) -> TokenRows:
    """The held-out rows that are measured, at most `HELDOUT_ROWS` of the text's: as `model` can read them."""
    rows = plan.text.heldout
    few = replace(
        rows,
        ids=rows.ids[:HELDOUT_ROWS],
        labels=None if rows.labels is None else rows.labels[:HELDOUT_ROWS],
        positions=None if rows.positions is None else rows.positions[:HELDOUT_ROWS],
    )
    return apart(model, few)


def heldout_loss(model: Any, plan: TrainingPlan) -> torch.Tensor:
    """Mean loss of every measured held-out row, float32 [rows]; none where nothing is held out."""
    return row_losses(model, heldout_rows(plan, model), micro_rows(plan))


def metrics_entry(metrics: Metrics, name: str = "") -> dict[str, Any]:
    """One run as it stands in the report, its lines of metrics.jsonl included: the picture is drawn from them."""
    return {
        "name": name,
        "steps": metrics.steps,
        "tokens": metrics.tokens,
        "loss": metrics.loss,
        "seconds": round(metrics.seconds, 3),
        "tokens_per_second": round(metrics.tokens_per_second, 1),
        "sparsity": metrics.sparsity,
        "history": list(metrics.history),
    }


def micro_rows(stage: TrainingPlan) -> int:
    """Rows that one process looks at in one forward pass."""
    return -(-stage.stage.batch // stage.stage.accumulation // max(1, distributed.world()))


def micro_tokens(stage: TrainingPlan) -> int:
    """Their tokens."""
    return micro_rows(stage) * stage.text.train.length


def training_needs(plan: Plan, stage: TrainingPlan, *, trained: float = 1.0, models: int = 1) -> Needs:
    """Memory and disk of a stage that trains; `trained` and `models` as in `needs.whole_needs`, the teacher apart."""
    return whole_needs(plan, stage, trained, micro_tokens(stage), models + stage.stage.needs_teacher)
