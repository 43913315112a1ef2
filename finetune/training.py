"""`train`: the one masked training path. What a method that needs training takes as `retrain(model, config)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..errors import DataError, RecipeError
from .losses import LossConfig
from .masked import Masks
from .quantised import keep_unpacked
from .schedules import DEFAULT_SCHEDULE, WARMUP, Rates, get_schedule
from .tokens import TokenRows

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class StepDone:
    """What the watcher of a run is told. `loss`: mean over the predicted tokens since the last report."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    sparsity: float | None
    tokens_per_second: float
    seconds_left: float
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How one run trains. Exactly one of `steps` and `tokens` is given.

    Attributes:
        folder: checkpoints (checkpoint-N) and metrics.jsonl of this run; made when absent.
        steps: optimizer steps. tokens: as many as it takes to see this many tokens, rounded up.
        learning_rate: the peak. schedule: a name of `schedules.SCHEDULES`. rates: what it needs besides the peak.
        optimizer: "adamw", "sgd" or "adamw-8bit"; make_optimizer(model) replaces it for methods with one of their own.
        weight_decay: on matrices only; biases and norms have none.
        batch: rows per optimizer step, over all processes; each accumulates `accumulation` micro-batches.
        clip: largest gradient norm, None for no limit.
        precision: of the forward pass; "bfloat16" and "float16" are automatic mixed precision over float32 weights.
        gradient_checkpointing: activations of a block are computed again in the backward pass.
        seed: order of the rows, dropout.
        loss: see `losses.LossConfig`.
        save_every: steps between checkpoints, the last step included; 0: only when the run is interrupted.
        log_every: steps between two lines of metrics.jsonl.
        resume: go on after the newest complete checkpoint in `folder`; afresh when there is none.
        progress: told about every line of metrics.jsonl.
        callbacks: transformers TrainerCallbacks of the method; those that are ExportableState are resumed with the run.
    """

    folder: Path
    steps: int | None = None
    tokens: int | None = None
    learning_rate: float = 1e-3
    schedule: str = DEFAULT_SCHEDULE
    warmup: float = WARMUP
    rates: Rates | None = None
    optimizer: str = "adamw"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    batch: int = 8
    accumulation: int = 1
    clip: float | None = 1.0
    precision: str = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    loss: LossConfig = LossConfig()
    save_every: int = 0
    log_every: int = 10
    resume: bool = False
    progress: Callable[[StepDone], None] | None = None
    callbacks: tuple[Any, ...] = ()
    make_optimizer: Callable[[nn.Module], Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if (self.steps is None) == (self.tokens is None):
            raise RecipeError("give the number of steps or the number of tokens, one of the two")
        length = self.tokens if self.steps is None else self.steps
        if min(length or 0, self.batch, self.accumulation, self.log_every) < 1:
            raise RecipeError("steps, tokens, batch, accumulation and log_every must be at least 1")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision {self.precision!r} is unknown; allowed: {', '.join(PRECISIONS)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise RecipeError(f"the learning rate must be positive, got {self.learning_rate:g}")
        get_schedule(self.schedule)

    def steps_for(self, length: int) -> int:
        """Optimizer steps on rows of `length` tokens."""
        return self.steps if self.steps is not None else math.ceil(self.tokens / (self.batch * length))  # type: ignore[operator]

    def rate(self, step: int, total: int) -> float:
        """The learning rate of step 0 <= step < total."""
        rates = replace(self.rates or Rates(self.learning_rate), peak=self.learning_rate, warmup=self.warmup)
        return get_schedule(self.schedule)(step, total, rates)


@dataclass(frozen=True)
class Metrics:
    """What a run came to. `loss`: mean of the last logged steps; `history`: the lines of metrics.jsonl."""

    steps: int
    tokens: int
    loss: float
    seconds: float
    tokens_per_second: float
    sparsity: float | None
    resumed_from: int
    history: tuple[dict[str, float], ...] = ()


class Retrain(Protocol):
    """What iterative methods take: train `model` in place under `model.gossamer_masks`, or under `masks`."""

    def __call__(self, model: Any, config: TrainingConfig, masks: Masks | None = None) -> Metrics: ...


def train(
    model: Any,
    config: TrainingConfig,
    masks: Masks | None = None,
    *,
    data: TokenRows,
    teacher: Any | None = None,
) -> Metrics:
    """Train `model` in place on `data` under masks; every pruned entry is proved zero at every save and at the end.

    Args:
        model: a transformers causal language model, dense in memory. Parameters that do not require a gradient stay.
        config: see `TrainingConfig`.
        masks: parameter name -> bool tensor of its shape (True = kept) or object with `to_bool()`. None: those of
            `model.gossamer_masks`, if it has any.
        data: rows of tokens.
        teacher: the dense model, for losses that compare with it. Not modified.

    Returns:
        What the run came to. The model is left in eval mode, on the device where it was trained.

    Raises:
        DataError: `data` has no rows.
        TrainingError: the loss is not finite, a pruned weight came back to life, ranks hold different masks, or
            DeepSpeed ZeRO or FSDP version 1 is asked for.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint has been saved.
    """
    from .trainer import run  # transformers' Trainer takes seconds to import

    if not len(data):
        raise DataError(f"{data.name} has no rows to train on", hint="give more text, or shorter rows")
    keep_unpacked(model)
    if masks is None:
        masks = getattr(model, "gossamer_masks", None) or {}
    return run(model, config, masks, data, teacher)


def retrain_on(data: TokenRows, teacher: Any | None = None) -> Retrain:
    """`train` on this text, as the callable that iterative methods take."""
    return partial(train, data=data, teacher=teacher)
