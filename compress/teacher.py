"""The model that a distillation learns from: the dense model of the run, or another one that the stage names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import DataError, RecipeError
from .load import load
from .plan import Planning
from .skeleton import load_config
from .source import open_source
from .stage_recipes.training import TrainingStage
from .stages.base import Context
from .text import load_tokenizer
from .whole import open_whole


def check_teacher(stage: TrainingStage, planning: Planning, length: int) -> None:
    """Whether there is something to learn from, on rows of `length` tokens; no weight is read.

    Raises:
        RecipeError: the model is pruned already and no teacher is named; the teacher has other tokens, too few
            positions, or, where hidden states are compared, another width or depth.
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
    folder = open_source(stage.teacher).folder
    theirs = load_config(folder, trust_remote_code=planning.trust_remote_code).get_text_config()
    ours = planning.skeleton.config.get_text_config()
    same_tokens = "a teacher must have the tokenizer of the model that learns"
    _check_equal(stage, planning, ours, theirs, "vocab_size", "tokens", same_tokens)
    if not _one_vocabulary(planning.source.folder, folder):
        raise RecipeError(
            f"the teacher {stage.teacher} has another tokenizer than {planning.model}: its tokens mean something else",
            hint=same_tokens,
        )
    limit = getattr(theirs, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise RecipeError(
            f"rows of {length} tokens are longer than the {limit} positions of the teacher {stage.teacher}",
            hint=f"use --seqlen {limit} or less",
        )
    if stage.hidden > 0:
        same_states = (
            "hidden states are compared one by one: leave `hidden` out, loss distill compares predictions alone"
        )
        _check_equal(stage, planning, ours, theirs, "hidden_size", "hidden channels", same_states)
        _check_equal(stage, planning, ours, theirs, "num_hidden_layers", "blocks", same_states)


def open_teacher(context: Context, stage: TrainingStage) -> Any:
    """The teacher in float32 on the run's device, its weights dense, without policies and head plans."""
    if stage.teacher is None:
        return open_whole(context, dense=True)
    folder = open_source(stage.teacher).folder
    trust = context.plan.trust_remote_code
    model = load(folder, dtype=torch.float32, packed=False, attachments=False, trust_remote_code=trust)
    return model.to(context.plan.device)


def _check_equal(
    stage: TrainingStage, planning: Planning, ours: Any, theirs: Any, field: str, said: str, hint: str
) -> None:
    own, other = getattr(ours, field, None), getattr(theirs, field, None)
    if own != other:
        raise RecipeError(f"the teacher {stage.teacher} has {other} {said}, {planning.model} has {own}", hint=hint)


def _one_vocabulary(ours: Path, theirs: Path) -> bool:
    """Whether the ids of both tokenizers stand for the same pieces; a teacher without tokenizer is believed."""
    try:
        other = load_tokenizer(theirs).get_vocab()
    except DataError:
        return True
    return bool(load_tokenizer(ours).get_vocab() == other)
