"""The activation stage: what the model skips at decode, calibrated on its weights as they are written."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...activation_sparsity.registry import DEFAULT, check_policy_method
from ..mistakes import Mistake, checked
from .base import BaseStage

DEFAULT_ACTIVATION_SPARSITY = 0.5
LARGE = 0.5  # a perplexity target beyond it is written with %
COREINFER = ("guide", "refresh", "alpha", "keep", "drift", "layers")
RSPARSE = ("rho", "population", "generations")
SEARCHING = ("auto", "threshold", "wina", "rsparse")


class ActivationStage(BaseStage):
    """An activation policy. Of `sparsity`, `keep`, `target_ppl_increase` and `target_speedup` at most one is given."""

    attaches: ClassVar[str | None] = "activation"
    repeats: ClassVar[bool] = True

    stage: Literal["activation"] = "activation"
    method: str = DEFAULT
    sparsity: float | None = Field(
        None, description="share of the linear weights that a decoded token skips; default 0.5 without a target"
    )
    target_ppl_increase: float | None = Field(None, description="highest increase of the perplexity: 0.01 or 1%")
    target_speedup: float | None = Field(None, description="of the linear maps at decode, by kernels measured here")
    guide: Literal["stability", "similarity"] | None = Field(None, description="how coreinfer chooses core neurons")
    refresh: int = Field(0, ge=0, description="coreinfer: tokens between two looks at drift; 0 = never")
    alpha: float | None = Field(None, gt=0, le=1, description="coreinfer: share of a token's neurons that vote")
    keep: float | None = Field(None, gt=0, lt=1, description="coreinfer: share of neurons that stay, for a sparsity")
    drift: float | None = Field(None, ge=0, le=1, description="coreinfer: similarity below which a set is taken anew")
    layers: tuple[int, int] | None = Field(None, description="coreinfer: first and last block that skips: 3-30, from 0")
    rho: float | None = Field(None, gt=0, le=1, description="rsparse: share of the budget for channels")
    population: int | None = Field(None, ge=2, description="rsparse: members of a generation of the search")
    generations: int | None = Field(None, ge=0, description="rsparse: generations of the search")
    search: bool = Field(
        True, description="whether budgets (auto, threshold, wina) or shares (rsparse) are searched for"
    )
    prompt: float = Field(0.25, gt=0, lt=1, description="share of a calibration window that is dense")
    calibration: str | None = None
    nsamples: int = Field(64, ge=2)
    seqlen: int | None = Field(None, ge=8)

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        checked(lambda: check_policy_method(value))
        return value

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise Mistake(
                f"activation sparsity must be in [0, 1), got {value:g}",
                hint="it is the share of the weights that a token skips: 0.5 skips half of them",
            )
        return value

    @field_validator("target_ppl_increase", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        percent = isinstance(value, str) and value.strip().endswith("%")
        try:
            number = float(value.strip()[:-1] if percent else value)
        except (TypeError, ValueError):
            return value
        if percent:
            return number / 100
        if LARGE < number <= 100 and isinstance(value, (str, int)):  # a recipe that was written has 60% as 0.6
            raise Mistake(
                f"target_ppl_increase {value} is an increase by {number:.0%}",
                hint=f"{number:g}%? One that large is written {100 * number:g}%",
            )
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        ends = value.split("-") if isinstance(value, str) else value
        try:
            first, last = (int(end) for end in ends)
        except (TypeError, ValueError):
            first, last = 0, -1
        if value is not None and not 0 <= first <= last:
            raise Mistake(f"layers {value!r} is no range of blocks", hint="3-30 is the fourth to the thirty-first")
        return None if value is None else (first, last)

    @field_validator("refresh")
    @classmethod
    def _sometimes(cls, value: int) -> int:
        if value == 1:
            raise Mistake(
                "refresh 1 would compute all neurons of every token",
                hint="a quarter of every period, and at least a token, is computed whole: 4 or more, or 0",
            )
        return value

    @field_validator("target_ppl_increase")
    @classmethod
    def _positive(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value <= 1:
            raise Mistake(f"target_ppl_increase must be in (0, 1], got {value:g}", hint="1 % is written 1% or 0.01")
        return value

    @field_validator("target_speedup")
    @classmethod
    def _faster(cls, value: float | None) -> float | None:
        if value is not None and not value > 1:
            raise Mistake(f"target_speedup must be above 1, got {value:g}", hint="1.6 asks for 1.6 times as fast")
        return value

    @model_validator(mode="after")
    def _one_goal(self) -> ActivationStage:
        goals = ("sparsity", "keep", "target_ppl_increase", "target_speedup")
        given = [name for name in goals if getattr(self, name) is not None]
        if len(given) > 1:
            raise Mistake(f"give one of {' and '.join(given)}", hint="each of them decides how much is skipped")
        for method, fields in (("coreinfer", COREINFER), ("rsparse", RSPARSE)):
            foreign = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
            if foreign and self.method != method:
                verb = "belong" if len(foreign) > 1 else "belongs"
                raise Mistake(f"{' and '.join(foreign)} {verb} to {method}, the method is {self.method}")
        if not self.search and self.method not in SEARCHING:
            raise Mistake(f"search belongs to {', '.join(SEARCHING)}, the method is {self.method}")
        if not self.search and (self.population is not None or self.generations is not None):
            raise Mistake("population and generations are of the search, and search is off", hint="leave them out")
        return self

    @property
    def goal(self) -> float | None:
        """The sparsity asked for; None where a target or `keep` decides."""
        if any(value is not None for value in (self.target_ppl_increase, self.target_speedup, self.keep)):
            return None
        return DEFAULT_ACTIVATION_SPARSITY if self.sparsity is None else self.sparsity
