"""transformers' Trainer with masks: our losses, schedules and order of rows; what is saved was proved first.

The Trainer and accelerate do what they do everywhere: mixed precision, accumulation, clipping, DDP, FSDP2, resuming.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from ..errors import TrainingError
from .bookkeeping import Bookkeeping, last_good
from .losses import IGNORED, loss_sum
from .masked import MaskGuard, Masks
from .optimizers import make_optimizer
from .resuming import changing, interruptible, newest_checkpoint, read_tensors, write_tensors
from .sharded import remember, restore
from .tokens import Sequence, TokenRows
from .training import Metrics, TrainingConfig


def run(model: Any, config: TrainingConfig, masks: Masks, data: TokenRows, teacher: Any | None) -> Metrics:
    """`training.train` with the masks found."""
    _refuse_zero()
    config.folder.mkdir(parents=True, exist_ok=True)
    total = config.steps_for(data.length)
    begun = newest_checkpoint(config.folder) if config.resume else None
    rows = Sequence(data, total * config.batch, config.seed)
    with _quiet(), _as_dense(model), interruptible() as pressed:
        trainer = MaskedTrainer(model, config, masks, rows, total, data.length, teacher)
        trainer.pressed = pressed
        before = remember(model) if trainer.is_fsdp_enabled else None
        try:
            trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
            trainer.prove()
        finally:
            trainer.release()
        if before is not None:
            restore(before)
    model.eval()
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer.metrics()


class MaskedTrainer(Trainer):
    """A Trainer that cannot lose a zero. `guard` holds the masks from the beginning of training on."""

    def __init__(
        self, model: Any, config: TrainingConfig, masks: Masks, rows: Sequence, total: int, length: int,
        teacher: Any | None,
    ) -> None:  # fmt: skip
        self.network: nn.Module = model
        self.config, self.masks, self.rows, self.total, self.length = config, masks, rows, total, length
        self.guard = MaskGuard(nn.Module(), {})
        self.pressed: Callable[[], bool] = lambda: False
        self.interrupted = False
        self.micro_losses: list[Tensor] = []
        self.history: list[dict[str, float]] = []
        self.started = time.monotonic()
        self.resumed_from = 0
        arguments = _arguments(model, config, total)
        callbacks = [*config.callbacks, Bookkeeping(self)]
        super().__init__(model=model, args=arguments, train_dataset=rows, data_collator=_stack, callbacks=callbacks)
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(arguments.device)
        self.loss_is_scaled_for_ga = True  # divided by the tokens of the whole step
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    # ---- what a step is ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        """Micro-batches of one step, and the tokens that all processes together predict in it."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(int((sample["labels"][:, 1:] != IGNORED).sum()) for sample in samples)
        tokens = torch.tensor(float(count), device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(tokens)
        return samples, tokens.clamp_min_(1)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss per predicted token of the step. Times the processes, because DDP and FSDP average over them."""
        labels = inputs.pop("labels")
        total = loss_sum(self.config.loss, model, self.teacher, inputs, labels)
        loss = total * self.args.world_size / num_items_in_batch
        self.micro_losses.append(loss.detach())
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.network if model is None else model, self.config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            peak, total = self.config.learning_rate, self.total

            def factor(step: int) -> float:
                return self.config.rate(min(step, total - 1), total) / peak

            self.lr_scheduler = LambdaLR(cast(torch.optim.Optimizer, optimizer or self.optimizer), factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.rows)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.prove()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What training changes, under the model's own names."""
        if self.args.should_save:
            found = changing(self.network) if state_dict is None else state_dict
            write_tensors(Path(output_dir or str(self.args.output_dir)), found)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_tensors(Path(resume_from_checkpoint), self.network)

    # ---- the end ----

    def prove(self) -> None:
        """TrainingError unless every pruned entry is zero and every weight that changes is a number."""
        self.guard.prove()
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.detach().sum())):
                raise TrainingError(
                    f"{name} is not finite after step {self.state.global_step}; {last_good(self.config.folder)}",
                    hint="lower the learning rate, or clip gradients",
                )

    def release(self) -> None:
        """Hooks off, whatever happened."""
        self.guard.detach()
        if self.config.gradient_checkpointing:
            cast(Any, self.network).gradient_checkpointing_disable()

    def metrics(self) -> Metrics:
        seconds = time.monotonic() - self.started
        per_step = self.config.batch * self.length
        steps = self.state.global_step - self.resumed_from
        return Metrics(
            steps=self.state.global_step,
            tokens=self.state.global_step * per_step,
            loss=self.history[-1]["loss"] if self.history else math.nan,
            seconds=seconds,
            tokens_per_second=steps * per_step / max(seconds, 1e-9),
            sparsity=self.guard.sparsity if len(self.guard) else None,
            resumed_from=self.resumed_from,
            history=tuple(self.history),
        )


def _arguments(model: Any, config: TrainingConfig, total: int) -> TrainingArguments:
    device = next(model.parameters()).device
    world = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(config.batch, world * config.accumulation)
    if rest or not share:
        raise TrainingError(
            f"a batch of {config.batch} rows is no multiple of {world} processes x {config.accumulation} micro-batches",
            hint="make the batch a multiple of processes x accumulation",
        )
    return TrainingArguments(
        output_dir=str(config.folder),
        max_steps=total,
        per_device_train_batch_size=share,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        max_grad_norm=config.clip or 0.0,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        seed=config.seed % 2**32,
        use_cpu=device.type == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _refuse_zero() -> None:
    """DeepSpeed partitions optimizer state behind our back, and FSDP version 1 flattens parameters: no mask fits."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise TrainingError(
            "training under masks with DeepSpeed ZeRO is not supported: nothing proves that zeros stay",
            hint="use DDP or FSDP2: accelerate launch --use_fsdp --fsdp_version 2",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainingError(
            "training under masks needs FSDP version 2; version 1 flattens parameters, and no mask fits",
            hint="accelerate launch --use_fsdp --fsdp_version 2",
        )


@contextmanager
def _as_dense(model: Any) -> Iterator[None]:
    """A model that was expanded while it was loaded from packed weights still calls itself quantised; it is not."""
    expanded = getattr(model, "is_quantized", False) and getattr(model, "gossamer_masks", None) is not None
    if expanded:
        model.is_quantized = False
    try:
        yield
    finally:
        if expanded:
            model.is_quantized = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's own remarks; ours go to whoever watches."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
