"""The heads stage: how much of the past each KV head keeps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..mistakes import Mistake
from .base import BaseStage

HeadMethod = Literal["gossamer", "uniform", "per-layer", "masformer", "duo", "moa"]
HeadLoss = Literal["all", "group", "fisher", "moa"]
DEFAULT_DENSITY = 0.5


class HeadsStage(BaseStage):
    """A head plan: one window rule per layer and KV head, within a budget of key-value bytes at every length."""

    attaches: ClassVar[str | None] = "heads"
    repeats: ClassVar[bool] = True

    stage: Literal["heads"] = "heads"
    method: HeadMethod = "gossamer"
    density: float = Field(DEFAULT_DENSITY, description="KV bytes kept, as a fraction of the dense cache's")
    lengths: tuple[int, ...] | None = None
    calibration: str | None = None
    nsamples: int = Field(32, ge=1)
    validation: str | None = None
    validation_samples: int = Field(16, ge=1)
    answers: Literal["given", "own"] = Field("given", description="own: the model's own answers to the prompts")
    loss: HeadLoss = Field("all", description="predicted loss to minimise; all: group, and a plan of each other one")
    sinks: tuple[int, ...] | None = None
    block: int | None = Field(None, ge=1)
    solver: Literal["relaxed", "full"] = "relaxed"
    time_limit: float = Field(60.0, gt=0)
    candidates: int = Field(6, ge=1)
    refine: int = Field(24, ge=0, description="plans that are measured to better the best one; 0: none")
    probe: int = Field(8, ge=0, description="sequences of the retrieval probe; 0: none")
    prefill: Literal["plan", "minference"] = Field(
        "plan", description="minference: also search a sparse prefill pattern for every query head"
    )
    plan_file: str | None = Field(None, description="a DuoAttention pattern (duo) or a MoA plan (moa)")

    @field_validator("density")
    @classmethod
    def _in_range(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise Mistake(
                f"density must be in (0, 1], got {value:g}",
                hint="it is the fraction of keys and values that is kept: 0.5 halves the cache",
            )
        return value

    @field_validator("lengths")
    @classmethod
    def _ascending(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 2 or list(value) != sorted(set(value))):
            raise Mistake(
                f"lengths must be ascending numbers of tokens, got {','.join(map(str, value)) or 'none'}",
                hint="for instance 2048,4096,8192",
            )
        return value

    @field_validator("sinks")
    @classmethod
    def _not_negative(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 0):
            raise Mistake("sinks are numbers of tokens >= 0, at least one of them", hint="for instance 0,4,16")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> HeadsStage:
        if self.method == "moa" and self.plan_file is None:
            raise Mistake(
                "method moa imports a plan: give its file",
                hint="a plan by MoA's objective on KV heads is `method: gossamer` with `loss: moa`",
            )
        if self.plan_file is not None and self.method not in ("duo", "moa"):
            raise Mistake(
                f"method {self.method} reads no plan file", hint="methods duo and moa do; leave the file out otherwise"
            )
        return self
