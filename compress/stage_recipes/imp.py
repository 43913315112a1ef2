"""The imp and soup stages: prune and retrain in phases."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...pruning.factors import DEFAULT_FACTOR, get_factor, values_of
from ...pruning.registry import check_method
from ..mistakes import Mistake, checked
from .sparsity import Scope
from .target import TargetStage

SoupKind = Literal["uniform", "greedy", "learned", "best"]


class ImpStage(TargetStage):
    """Iterative pruning: in every phase the same part of the remaining weights goes, and the rest is retrained.

    Steps (or tokens) are those of all phases together.
    """

    prunes_in_phases: ClassVar[bool] = True

    stage: Literal["imp"] = "imp"
    phases: int = Field(3, ge=1, description="prune-retrain cycles")
    score: str = Field("magnitude", description="what goes first: magnitude, or any one-shot method")
    calibration: str | None = Field(None, description="text of a score that needs one; default: the training text")
    nsamples: int = Field(128, ge=1, description="calibration windows")

    @model_validator(mode="after")
    def _known_score(self) -> ImpStage:
        checked(lambda: check_method(self.score))
        if self.score != "magnitude" and self.scope == "model":
            raise Mistake(
                f"scope model is not possible with {self.score}: its scores compare inside one matrix only",
                hint="use scope row or matrix, or score magnitude",
            )
        return self

    @property
    def unit(self) -> Scope:
        """The scope that holds: scores other than magnitude compare inside one matrix only."""
        return self.scope or ("model" if self.score == "magnitude" else "row")


class SoupStage(ImpStage):
    """Sparse model soups: every phase trains several candidates from one parent under one mask, and averages them.

    Steps (or tokens) are those of one candidate over all phases.
    """

    stage: Literal["soup"] = "soup"  # type: ignore[assignment]
    candidates: int = Field(3, ge=2)
    factor: str = Field(DEFAULT_FACTOR, description="what the candidates differ in")
    factor_values: tuple[str, ...] = Field((), description="one per candidate; default: the factor's own")
    soup: SoupKind = Field("uniform", description="which candidates go in, and how much of each")
    margin: float = Field(1.0, ge=0, description="greedy: standard errors by which a candidate must help")
    learning_steps: int = Field(10, ge=1, description="learned: gradient steps of the weights")
    measure: str | None = Field(
        None, description="text on which candidates, soups and ensemble are compared at the end"
    )
    measure_windows: int | None = Field(None, ge=1, description="at most so many windows of that text")

    @field_validator("factor_values", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """ "1e-3,2e-3" is a list too, and so are numbers."""
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts) if isinstance(parts, (list, tuple)) else parts

    @model_validator(mode="after")
    def _known_factor(self) -> SoupStage:
        checked(lambda: get_factor(self.factor))
        field = get_factor(self.factor).field
        if self.factor_values or field != "steps":  # the steps of a phase are known to the plan
            base = getattr(self, field, None) or 1
            checked(lambda: values_of(self.factor, base, self.candidates, self.factor_values))
        if self.heldout == 0 and self.soup != "uniform":
            raise Mistake(
                f"a {self.soup} soup chooses on held-out text, and heldout is 0",
                hint="give heldout 0.1, or soup uniform",
            )
        return self
