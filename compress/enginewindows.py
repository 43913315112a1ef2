"""The head plan of a checkpoint in the words of engines that have one window per layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..attention.plan import HeadPlan
from ..attention.windows import engine_settings
from ..errors import ModelError
from .attachments import entries
from .modelfolder import read_config, resolve_folder


def engine_windows(
    path_or_id: str | Path, engine: str, *, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """What to tell `engine`. ModelError for a model without a head plan, or one that ignores windows per layer there;

    RecipeError for a plan that the engine cannot run.
    """
    folder = resolve_folder(path_or_id, revision=revision, token=token)
    config = read_config(folder)
    entry = entries(config).get("heads")
    if entry is None:
        raise ModelError(f"{folder} has no head plan", hint="gossamer plan-heads MODEL -o OUT makes one")
    found = engine_settings(HeadPlan.from_json(entry), engine)
    if engine == "transformers" and not _has_layer_types(folder):
        raise ModelError(
            f"models of type {config.get('model_type')} have no windows per layer in transformers",
            hint="--engine tensorrt-llm, or run the plan with Gossamer",
        )
    return found


def _has_layer_types(folder: Path) -> bool:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(folder).get_text_config(decoder=True), "layer_types", None) is not None
