"""The prune stage: one-shot pruning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...pruning.registry import DEFAULT_METHOD
from ..mistakes import Mistake
from .sparsity import Scope, SparsityStage

Allocation = Literal["uniform", "owl"]


class PruneStage(SparsityStage):
    """One-shot pruning, decoder block by decoder block."""

    stage: Literal["prune"] = "prune"
    method: str = DEFAULT_METHOD
    allocation: Allocation = "uniform"
    scope: Scope | None = Field(
        None, description="unit of comparison of unstructured scores; default: the method's own"
    )
    reconstruct: bool = False
    untie: bool = False
    calibration: str | None = None
    nsamples: int = Field(128, ge=1)
    seqlen: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _consistent(self) -> PruneStage:
        if self.allocation == "owl" and self.pattern is not None:
            raise Mistake(
                "allocation owl needs an unstructured sparsity: a fixed pattern leaves nothing to allocate",
                hint="give a sparsity instead of the pattern, or leave the allocation out",
            )
        if self.allocation == "owl" and self.scope == "model":
            raise Mistake("allocation owl and scope model both decide the sparsity per matrix", hint="give one of them")
        return self
