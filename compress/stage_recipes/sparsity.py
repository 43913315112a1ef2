"""What stages that make masks share: which matrices, and how much of them goes."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..mistakes import Mistake
from .base import BaseStage

Scope = Literal["row", "matrix", "model"]

DEFAULT_SPARSITY = 0.5


class SelectingStage(BaseStage):
    """A stage that gives masks to chosen matrices."""

    changes_weights: ClassVar[bool] = True
    makes_masks: ClassVar[bool] = True

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @field_validator("include", "exclude")
    @classmethod
    def _valid_regex(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            check_regex(pattern)
        return value


class SparsityStage(SelectingStage):
    """One that ends at a sparsity or a pattern."""

    sparsity: float | None = Field(None, description="fraction of zeros; default 0.5 when no pattern is given")
    pattern: str | None = Field(None, description='"2:4" (keep 2 of every 4 inputs) or "block:4x8"')

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise Mistake(
                f"sparsity must be in [0, 1), got {value:g}",
                hint="it is the fraction of zeros: 0.5 removes half of the weights",
            )
        return value

    @model_validator(mode="after")
    def _one_target(self) -> SparsityStage:
        if self.sparsity is not None and self.pattern is not None and not self.pattern.startswith("block"):
            raise Mistake(
                "give sparsity or pattern, not both (a block pattern takes a sparsity)",
                hint="N:M says it already: 2:4 is 50 %, 1:4 is 75 %",
            )
        return self

    @property
    def pattern_text(self) -> str:
        """The pattern as `pruning.pattern.parse_pattern` reads it: "0.5", "2:4" or "block:4x8:0.5"."""
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        if self.pattern is None:
            return repr(sparsity)
        return f"{self.pattern}:{sparsity!r}" if self.pattern.startswith("block") else self.pattern


def check_regex(pattern: str) -> None:
    """Mistake unless it is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise Mistake(
            f"{pattern!r} is not a valid regular expression: {error}",
            hint="put a backslash before characters that are meant as they are, such as \\( and \\[",
        ) from error
