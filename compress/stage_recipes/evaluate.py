"""The evaluate stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import BaseStage

DEFAULT_EVALUATION = "wikitext2"


class EvaluateStage(BaseStage):
    """Perplexity and KL to the dense model, at this point of the recipe."""

    stage: Literal["evaluate"] = "evaluate"
    data: str = DEFAULT_EVALUATION
    seqlen: int | None = Field(None, ge=2)
    windows: int | None = Field(None, ge=1)
