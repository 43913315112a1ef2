"""The model that a distillation learns from: the dense model of the run, or another one that the stage names."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import RecipeError
from .load import load
from .plan import Planning
from .source import open_source
from .stage_recipes.training import TrainingStage
from .stages.base import Context
from .whole import open_whole


def check_teacher(stage: TrainingStage, planning: Planning) -> None:
    """Whether there is something to learn from.

    Raises:
        RecipeError: the model is pruned already and no teacher is named, or the teacher has other tokens.
    """
    if not stage.needs_teacher:
        return
    if stage.teacher is None:
        if planning.source.records():
            raise RecipeError(
                f"{planning.model} is pruned already: distilled from itself, it would learn nothing",
                hint="name the dense model that it was made from: --teacher MODEL (in a recipe teacher: MODEL)",
            )
        return
    own, other = (_tokens(config) for config in (planning.source.config, open_source(stage.teacher).config))
    if own != other:
        raise RecipeError(
            f"the teacher {stage.teacher} has {other} tokens, {planning.model} has {own}",
            hint="a teacher must have the tokenizer of the model that learns",
        )


def open_teacher(context: Context, stage: TrainingStage) -> Any:
    """The teacher in float32 on the run's device, its weights dense, without policies and head plans."""
    if stage.teacher is None:
        return open_whole(context, dense=True)
    folder = open_source(stage.teacher).folder
    trust = context.plan.trust_remote_code
    model = load(folder, dtype=torch.float32, packed=False, attachments=False, trust_remote_code=trust)
    return model.to(context.plan.device)


def _tokens(config: dict[str, Any]) -> int | None:
    return config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
