"""What every stage that trains says in a recipe: the text, how long, how fast."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..mistakes import Mistake
from .base import BaseStage

Optimizer = Literal["adamw", "sgd", "adamw-8bit"]
Precision = Literal["float32", "bfloat16", "float16"]
Loss = Literal["lm", "distill", "mix"]
ScheduleName = Literal["ft", "lrw", "slr", "clr", "llr", "allr"]

DEFAULT_TRAINING = "c4"
DEFAULT_TOKENS = 1_000_000


class TrainingStage(BaseStage):
    """The fields of a stage that trains the whole model. Subclasses add the method's own."""

    model_config = ConfigDict(allow_inf_nan=False)
    changes_weights: ClassVar[bool] = True
    repeats: ClassVar[bool] = True
    prunes_in_phases: ClassVar[bool] = False  # and so knows what schedule allr asks for

    data: str = Field(DEFAULT_TRAINING, description="text, JSONL instructions or a dataset; a hash split is held out")
    heldout: float = Field(0.1, ge=0, lt=1, description="share of the records that is never trained on")
    seqlen: int | None = Field(None, ge=2, description="tokens per row; default: the model's positions, at most 2048")
    tokens: int | None = Field(None, ge=1, description="tokens to train on; default 1,000,000 when no steps are given")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of tokens")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    schedule: ScheduleName = "llr"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    optimizer: Optimizer = "adamw"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    batch: int = Field(8, ge=1, description="rows per optimizer step, over all processes")
    accumulation: int = Field(1, ge=1, description="micro-batches per step and process")
    clip: float | None = Field(1.0, gt=0)
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    loss: Loss = "lm"
    teacher: str | None = Field(None, description="model to distill from; default: the dense model of the run")
    temperature: float = Field(1.0, gt=0)
    share: float = Field(0.5, ge=0, le=1, description="of the distillation in loss mix")
    hidden: float = Field(0.0, ge=0, description="weight of the distance of hidden states to the dense model's")
    save_every: int = Field(200, ge=0, description="steps between checkpoints that --resume goes on from")
    log_every: int = Field(10, ge=1)

    @field_validator("schedule")
    @classmethod
    def _possible(cls, value: str) -> str:
        if value in ("lrw", "slr"):
            raise Mistake(
                f"schedule {value} replays the learning rates of the dense training, which no checkpoint holds",
                hint="use clr or llr, or train from Python with Rates(history=...)",
            )
        if value == "allr" and not cls.prunes_in_phases:
            raise Mistake(
                "schedule allr starts from the damage of a pruning phase, and only the stages imp and soup have phases",
                hint="use llr",
            )
        return value

    @model_validator(mode="after")
    def _length(self) -> TrainingStage:
        if self.tokens is not None and self.steps is not None:
            raise Mistake("give tokens or steps, not both", hint="steps = tokens / (batch * seqlen)")
        if self.teacher is not None and not self.needs_teacher:
            raise Mistake("a teacher is given, and the loss is of the text alone", hint="add loss distill or mix")
        self._unused("momentum", self.optimizer == "sgd", "optimizer sgd has a momentum, the others have their own")
        self._unused("temperature", self.loss != "lm", "it softens a teacher's predictions: add loss distill or mix")
        self._unused("share", self.loss == "mix", "it divides loss mix: add loss mix")
        if self.batch % self.accumulation:
            raise Mistake(
                f"a batch of {self.batch} rows cannot be split into {self.accumulation} micro-batches",
                hint="make the batch a multiple of the accumulation",
            )
        return self

    def _unused(self, name: str, used: bool, hint: str) -> None:
        """Mistake when a field has a value of its own that nothing looks at."""
        value = getattr(self, name)
        if not used and value != type(self).model_fields[name].default:
            raise Mistake(f"{name} {value:g} is given, and nothing uses it", hint=hint)

    @property
    def needs_teacher(self) -> bool:
        return self.loss != "lm" or self.hidden > 0

    def count_steps(self, length: int) -> int:
        """Optimizer steps on rows of `length` tokens."""
        if self.steps is not None:
            return self.steps
        tokens = DEFAULT_TOKENS if self.tokens is None else self.tokens
        return -(-tokens // (self.batch * length))
