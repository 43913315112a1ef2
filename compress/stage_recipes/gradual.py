"""The gradual stage, and the random-search baseline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..mistakes import Mistake
from .target import TargetStage


class GradualStage(TargetStage):
    """Gradual magnitude pruning: the mask tightens along a cubic curve while the model trains."""

    stage: Literal["gradual"] = "gradual"
    begin: float = Field(0.0, ge=0, lt=1, description="share of the steps before the first weights go")
    end: float = Field(0.75, gt=0, le=1, description="share of the steps after which the mask is frozen")
    every: int = Field(10, ge=1, description="steps between two tightenings")

    @model_validator(mode="after")
    def _rising(self) -> GradualStage:
        if self.begin > self.end:
            raise Mistake(f"begin {self.begin:g} lies behind end {self.end:g}", hint="begin 0 and end 0.75 are usual")
        if self.pattern is not None and not self.pattern.startswith("block"):
            raise Mistake(
                f"gradual pruning follows a curve of sparsities, and {self.pattern} is a fixed pattern",
                hint="use stage imp or nm-flow for N:M",
            )
        return self


class RandomStage(TargetStage):
    """The baseline: the best of several random sparse subnetworks, all together trained for the given steps."""

    stage: Literal["random"] = "random"
    tries: int = Field(8, ge=1)
    heldout: float = Field(0.1, gt=0, lt=1, description="share of the records that decides which one is best")
