"""The finetune stage: training under the masks that the model has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...errors import RecipeError
from ...finetune.budget import check_budget
from ...finetune.methods import DEFAULT_METHOD, method_names
from ...finetune.reselection import check_schedule, window_of
from ..mistakes import Mistake
from .training import TrainingStage


class FinetuneStage(TrainingStage):
    """Recovery after pruning, or further training: zeros stay zeros."""

    stage: Literal["finetune"] = "finetune"
    method: str = DEFAULT_METHOD
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False, description="default: the method's own")  # type: ignore[assignment]
    rank: int = Field(16, ge=1, description="columns of the low-rank factors")
    alpha: float = Field(32.0, gt=0, description="the low-rank update is multiplied by alpha / rank")
    density: float | None = Field(None, description="of the adapted weights that sparse deltas train; default 0.01")
    num_weights: int | None = Field(None, description="the number of entries of sparse deltas, instead of a density")
    rank_equivalent: float | None = Field(None, description="as many entries as LoRA of this rank trains")
    allocation: Literal["uniform", "erk", "global"] = Field("uniform", description="of entries over matrices")
    selection: Literal["random", "magnitude", "gradient", "snip", "fisher"] | None = Field(
        None, description="positions to begin with; default: gradient, for spiel-ma random"
    )
    where: Literal["all", "kept", "seft"] | None = Field(
        None, description="kept: on surviving weights; seft: anywhere, then pruned again; default: kept under masks"
    )
    base_quant: Literal["nf4", "fp4", "int8"] | None = Field(
        None, description="bitsandbytes holds the weights below the adapter in 4 or 8 bits; lossy"
    )
    interval: int = Field(10, description="updates between two choices of positions")
    window: int | None = Field(
        None, description="updates before a choice during which gradients are looked at; default: all of the interval"
    )
    look_every: int = Field(5, description="one in so many of these updates looks at all gradients of a matrix")
    replace: float | None = Field(
        None,
        description="share of the entries that the choice at the beginning replaces; default: 0.5, for spiel-ma 0.2",
    )
    anneal: Literal["linear", "cosine"] = Field("linear", description="how that share falls to 0")
    adapter_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the values in the adapter's file")
    score_rank: int = Field(8, ge=1, description="pst: columns of the factors of the learned score")
    sparsity: float | None = Field(None, ge=0, lt=1, description="pst: fraction of zeros of every matrix; default 0.5")
    pattern: str | None = Field(None, description='pst: "2:4" and the like, instead of a sparsity')
    every: int = Field(20, ge=1, description="dst: steps between two moves of the masks")
    drop: float = Field(0.3, gt=0, le=1, description="dst: share of the kept weights that the first move replaces")
    stop: float = Field(0.75, gt=0, le=1, description="dst: share of the steps after which masks stay")
    extras: bool = Field(True, description="masklora: biases and norms are trained too")

    @model_validator(mode="after")
    def _known(self) -> FinetuneStage:
        if self.method not in method_names():
            raise Mistake(
                f"fine-tuning method {self.method!r} is unknown", hint=f"allowed: {', '.join(method_names())}"
            )
        try:
            check_budget(self.density, self.num_weights, self.rank_equivalent)
            window = window_of(self.interval, self.window)
            check_schedule(self.interval, window, self.look_every, self.replace, self.anneal)
        except RecipeError as error:
            raise Mistake(error.message, hint=error.hint) from error
        if self.allocation == "global" and self.selection == "random":
            raise Mistake("allocation global compares scores, and selection random has none")
        if self.sparsity is not None and self.pattern is not None:
            raise Mistake("give sparsity or pattern, not both", hint="N:M says it already: 2:4 is 50 %")
        return self
