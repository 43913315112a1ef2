"""What stages that prune while they train say of the masks: how much goes, in which units, where."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from ..mistakes import Mistake
from .prune import DEFAULT_SPARSITY, Scope
from .training import TrainingStage


class TargetStage(TrainingStage):
    """A training stage that ends at a sparsity or pattern. The head is never pruned."""

    sparsity: float | None = Field(None, description="fraction of zeros at the end; default 0.5 without a pattern")
    pattern: str | None = Field(None, description='"2:4" (keep 2 of every 4 inputs) or "block:4x8"')
    scope: Scope | None = Field(None, description="unit of comparison of unstructured scores; default: model")
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise Mistake(
                f"sparsity must be in [0, 1), got {value:g}",
                hint="it is the fraction of zeros: 0.5 removes half of the weights",
            )
        return value

    @field_validator("include", "exclude")
    @classmethod
    def _valid_regex(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise Mistake(f"{pattern!r} is not a valid regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _one_target(self) -> TargetStage:
        if self.sparsity is not None and self.pattern is not None and not self.pattern.startswith("block"):
            raise Mistake(
                "give sparsity or pattern, not both (a block pattern takes a sparsity)",
                hint="N:M says it already: 2:4 is 50 %, 1:4 is 75 %",
            )
        return self

    @property
    def unit(self) -> Scope:
        """The scope that holds."""
        return self.scope or "model"

    @property
    def untie(self) -> bool:
        """Matrices of the blocks alone are pruned here, so the head stays as it is."""
        return False

    @property
    def pattern_text(self) -> str:
        """The pattern as `pruning.pattern.parse_pattern` reads it."""
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        if self.pattern is None:
            return repr(sparsity)
        return f"{self.pattern}:{sparsity!r}" if self.pattern.startswith("block") else self.pattern
