"""The export stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..mistakes import checked
from ..sizes import parse_bytes
from .base import BaseStage

Format = Literal["sparse", "dense", "both"]
Values = Literal["same", "int8"]


class ExportStage(BaseStage):
    """Which checkpoint files are written, and what the kept weights of pruned matrices are rounded to."""

    stage: Literal["export"] = "export"
    format: Format = "sparse"
    values: Values = Field("same", description="int8: 8-bit integers with a scale per 128 inputs; loses precision")
    max_shard_size: str = "5GB"

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        checked(lambda: parse_bytes(value))
        return value

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that are written."""
        return ("dense", "sparse") if self.format == "both" else (self.format,)
