"""The nm-flow stage: training towards an N:M pattern."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from ..mistakes import Mistake
from .sparsity import SelectingStage, check_regex
from .training import TrainingStage

Flow = Literal["mdgf-exp", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric", "sr-ste", "ste"]
Gradient = Literal["product", "straight"]

DEFAULT_PATTERN = "2:4"
DENSE = "dense"
_NM = re.compile(r"\d+:\d+")


class NmFlowStage(SelectingStage, TrainingStage):
    """Progressive gradient flow for N:M: the pattern is reached while the model is trained."""

    stage: Literal["nm-flow"] = "nm-flow"
    pattern: str = Field(DEFAULT_PATTERN, description='"1:8" keeps 1 of every 8 inputs')
    patterns: dict[str, str] = Field(
        default_factory=dict,
        description='regex of matrix names -> another N:M, or "dense": {self_attn: "2:4"}; the first match counts',
    )
    flow: Flow = Field("mdgf-exp", description="how the pattern is approached")
    tail: float = Field(0.2, ge=0, le=1, description="share of the steps, at the end, under the frozen mask")
    decay: float | None = Field(None, gt=0, allow_inf_nan=False, description="rate of mdgf; default: its own")
    gradient: Gradient | None = Field(None, description="true gradient or straight-through; default: the flow's own")
    shrink: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="pull of pruned weights towards zero; default: the flow's own"
    )
    decoupled: bool = Field(True, description="shrink acts on the weights, as AdamW's decay; else on the gradient")

    @property
    def untie(self) -> bool:
        return False

    @field_validator("pattern")
    @classmethod
    def _is_nm(cls, value: str) -> str:
        if not _NM.fullmatch(value):
            raise Mistake(f"nm-flow trains N:M patterns, got {value!r}", hint="1:8 keeps 1 of every 8 inputs")
        return value

    @field_validator("patterns")
    @classmethod
    def _are_nm(cls, value: dict[str, str]) -> dict[str, str]:
        for regex, pattern in value.items():
            check_regex(regex)
            if pattern != DENSE:
                cls._is_nm(pattern)
        return value
