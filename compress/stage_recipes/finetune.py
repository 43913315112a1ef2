"""The finetune stage: training under the masks that the model has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...finetune.methods import DEFAULT_METHOD, method_names
from ..mistakes import Mistake
from .training import TrainingStage


class FinetuneStage(TrainingStage):
    """Recovery after pruning, or further training: zeros stay zeros."""

    stage: Literal["finetune"] = "finetune"
    method: str = DEFAULT_METHOD
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False, description="default: the method's own")  # type: ignore[assignment]
    rank: int = Field(16, ge=1, description="columns of the low-rank factors")
    alpha: float = Field(32.0, gt=0, description="the low-rank update is multiplied by alpha / rank")
    extras: bool = Field(True, description="masklora: biases and norms are trained too")

    @model_validator(mode="after")
    def _known(self) -> FinetuneStage:
        if self.method not in method_names():
            raise Mistake(
                f"fine-tuning method {self.method!r} is unknown", hint=f"allowed: {', '.join(method_names())}"
            )
        return self
