"""The merge stage: an adapter becomes part of the weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import BaseStage


class MergeStage(BaseStage):
    """Adds an adapter of peft to the weights; zeros under masks stay zeros."""

    changes_weights: ClassVar[bool] = True

    stage: Literal["merge"] = "merge"
    adapter: str = Field(description="folder with adapter_model.safetensors and adapter_config.json")
    check_base: bool = Field(True, description="refuse an adapter that was trained on other weights")
