"""What all stages of a recipe share. Import-light: pydantic only, no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A part of a recipe: nothing changes it after validation, and unknown fields are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseStage(Frozen):
    """One stage. Subclasses give `stage` a Literal type and a default: the name in YAML.

    `changes_weights`: its result is a model with other weights. `makes_masks`: it gives masks to matrices, or smaller
    ones. `attaches`: the name of what it adds beside the weights
    (an activation policy, a head plan), kept under our key in config.json; such stages run after the last one that
    changes weights, because what they add was measured on the weights as they are written. `repeats`: it computes with
    tensors of the same sizes many times, so that it pays to keep their memory.
    """

    changes_weights: ClassVar[bool] = False
    makes_masks: ClassVar[bool] = False
    attaches: ClassVar[str | None] = None
    repeats: ClassVar[bool] = False

    stage: str
