"""The activation stage: what the model skips at decode, calibrated on its weights as they are written."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...activation_sparsity.registry import DEFAULT, check_policy_method
from ..mistakes import Mistake, checked
from .base import BaseStage

DEFAULT_ACTIVATION_SPARSITY = 0.5


class ActivationStage(BaseStage):
    """An activation policy. Of `sparsity`, `target_ppl_increase` and `target_speedup` at most one is given."""

    attaches: ClassVar[str | None] = "activation"

    stage: Literal["activation"] = "activation"
    method: str = DEFAULT
    sparsity: float | None = Field(
        None, description="share of the linear weights that a decoded token skips; default 0.5 without a target"
    )
    target_ppl_increase: float | None = Field(None, description="highest increase of the perplexity: 0.01 or 1%")
    target_speedup: float | None = Field(None, description="of the linear maps at decode, by kernels measured here")
    guide: Literal["stability", "similarity"] | None = Field(None, description="how coreinfer chooses core neurons")
    refresh: int = Field(0, ge=0, description="coreinfer: tokens between two looks at drift; 0 = never")
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
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip()[:-1]) / 100
            except ValueError:
                return value
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
        goals = {
            "sparsity": self.sparsity, "target_ppl_increase": self.target_ppl_increase,
            "target_speedup": self.target_speedup,
        }  # fmt: skip
        given = [name for name, value in goals.items() if value is not None]
        if len(given) > 1:
            raise Mistake(f"give one of {' and '.join(given)}", hint="each of them decides how much is skipped")
        if (self.guide is not None or self.refresh) and self.method != "coreinfer":
            raise Mistake(f"guide and refresh belong to coreinfer, the method is {self.method}")
        return self

    @property
    def goal(self) -> float | None:
        """The sparsity asked for; None where a target decides."""
        if self.target_ppl_increase is not None or self.target_speedup is not None:
            return None
        return DEFAULT_ACTIVATION_SPARSITY if self.sparsity is None else self.sparsity
