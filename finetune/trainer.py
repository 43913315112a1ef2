"""transformers' Trainer with masks: our losses, schedules and order of rows; what is saved was proved first.

The Trainer and accelerate do what they do everywhere: mixed precision, accumulation, clipping, DDP, FSDP2, resuming.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..errors import CheckpointError, TrainingError
from .losses import IGNORED, loss_sum
from .masked import MaskGuard, Masks, agree_on_masks
from .optimizers import make_optimizer
from .tokens import Sequence, TokenRows
from .training import Metrics, StepDone, TrainingConfig

STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
METRICS = "metrics.jsonl"


def run(model: Any, config: TrainingConfig, masks: Masks, data: TokenRows, teacher: Any | None) -> Metrics:
    """`training.train` with the masks found."""
    _refuse_zero()
    config.folder.mkdir(parents=True, exist_ok=True)
    total = config.steps_for(data.length)
    begun = newest_checkpoint(config.folder) if config.resume else None
    rows = Sequence(data, total * config.batch, config.seed)
    trainer = MaskedTrainer(model, config, masks, rows, total, data.length, teacher)
    with interruptible() as pressed:
        trainer.pressed = pressed
        trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
    trainer.finish()
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer.metrics()


class MaskedTrainer(Trainer):
    """A Trainer that cannot lose a zero. `guard` holds the masks from the beginning of training on."""

    guard: MaskGuard

    def __init__(
        self, model: Any, config: TrainingConfig, masks: Masks, rows: Sequence, total: int, length: int,
        teacher: Any | None,
    ) -> None:  # fmt: skip
        arguments = _arguments(model, config, total)
        callbacks = [*config.callbacks, _Bookkeeping(self)]
        super().__init__(model=model, args=arguments, train_dataset=rows, data_collator=_stack, callbacks=callbacks)
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self.config, self.masks, self.total, self.length = config, masks, total, length
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(arguments.device)
        self.loss_is_scaled_for_ga = True  # divided by the tokens of the whole step
        self.pressed: Callable[[], bool] = lambda: False
        self.interrupted = False
        self.micro_losses: list[Tensor] = []
        self.history: list[dict[str, float]] = []
        self.started = time.monotonic()
        self.resumed_from = 0
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
            self.optimizer = make_optimizer(self.model if model is None else model, self.config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            peak, total = self.config.learning_rate, self.total
            factor = lambda step: self.config.rate(min(step, total - 1), total) / peak  # noqa: E731
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.guard.prove()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What training changes, under the model's own names: trainable parameters and persistent buffers."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            found = changing(self.model) if state_dict is None else state_dict
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / WEIGHTS
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", hint="start afresh without --resume") from error
        wanted = changing(self.model)
        if saved.keys() != wanted.keys() or any(saved[name].shape != wanted[name].shape for name in saved):
            raise CheckpointError(f"{path} is of another model or method", hint="start afresh without --resume")
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(saved[name])

    # ---- the end ----

    def finish(self) -> None:
        """The last proof; hooks off, the model as it was found but for its weights."""
        if self.guard.prove() != self.guard.zeros:
            raise TrainingError("the number of pruned weights has changed")
        self.guard.detach()
        if self.config.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()

    def metrics(self) -> Metrics:
        seconds = time.monotonic() - self.started
        steps = self.state.global_step - self.resumed_from
        tokens = self.total * self.config.batch * self.length
        return Metrics(
            steps=self.state.global_step,
            tokens=tokens,
            loss=self.history[-1]["loss"] if self.history else math.nan,
            seconds=seconds,
            tokens_per_second=steps * self.config.batch * self.length / max(seconds, 1e-9),
            sparsity=self.guard.sparsity if len(self.guard) else None,
            resumed_from=self.resumed_from,
            history=tuple(self.history),
        )


class _Bookkeeping(TrainerCallback):
    """Masks on, losses checked, metrics written, Ctrl-C noticed."""

    def __init__(self, trainer: MaskedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer = self.trainer
        trainer.guard = MaskGuard(trainer.model, trainer.masks)
        if args.world_size > 1:
            agree_on_masks(trainer.guard)
        inner = trainer.optimizer
        while hasattr(inner, "optimizer"):  # accelerate's wrapper
            inner = inner.optimizer
        trainer.guard.watch(inner)
        trainer.resumed_from = state.global_step
        trainer.started = time.monotonic()
        if args.should_save:
            trainer.history = _history(trainer.config.folder / METRICS, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Before weights change: they stay those of the last good step."""
        trainer = self.trainer
        loss = torch.stack(trainer.micro_losses).sum()
        trainer.micro_losses.clear()
        flags = torch.stack(
            [(~torch.isfinite(loss)).float(), torch.tensor(float(trainer.pressed()), device=loss.device)]
        )
        if args.world_size > 1:
            torch.distributed.all_reduce(flags)
        bad, pressed = (bool(flag) for flag in flags.tolist())
        if bad:
            raise _not_finite(state.global_step + 1, trainer.config.folder)
        trainer.interrupted = trainer.interrupted or pressed

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        every, interrupted = self.trainer.config.save_every, self.trainer.interrupted
        if interrupted or (every and state.global_step % every == 0):
            control.should_save = True
        if interrupted or state.global_step >= self.trainer.total:
            control.should_log = True
        if interrupted:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        trainer = self.trainer
        if logs is None or "loss" not in logs or not args.should_save:
            return
        done = state.global_step - trainer.resumed_from
        seconds = time.monotonic() - trainer.started
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "tokens": state.global_step * trainer.config.batch * trainer.length,
            "tokens_per_s": round(done * trainer.config.batch * trainer.length / max(seconds, 1e-9), 1),
        }
        if len(trainer.guard):
            line["sparsity"] = round(trainer.guard.sparsity, 8)
        line |= {key: value for key, value in logs.items() if key not in ("loss", "learning_rate", "epoch")}
        trainer.history.append(line)
        with (trainer.config.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if trainer.config.progress is not None:
            trainer.config.progress(
                StepDone(
                    step=state.global_step,
                    steps=trainer.total,
                    loss=line["loss"],
                    learning_rate=line["lr"],
                    sparsity=line.get("sparsity"),
                    tokens_per_second=line["tokens_per_s"],
                    seconds_left=seconds / max(done, 1) * (trainer.total - state.global_step),
                    more={key: value for key, value in line.items() if key not in _KNOWN},
                )
            )


_KNOWN = ("step", "loss", "lr", "sparsity", "tokens", "tokens_per_s")


def changing(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of everything that training may change: trainable parameters and persistent buffers."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = model.state_dict().keys()
    return found | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the largest step that was written to its end; its state file is written last."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is only noted (the function given says so), the second one ends the program as usual."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


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
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
    )


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _history(path: Path, step: int) -> list[dict[str, float]]:
    """The lines up to `step`, all that stays of an earlier run's file."""
    lines = []
    if path.exists() and step > 0:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue  # cut off by the kill
    kept = [line for line in lines if line.get("step", 0) <= step]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept


def _not_finite(step: int, folder: Path) -> TrainingError:
    good = newest_checkpoint(folder)
    kept = "no checkpoint was saved before" if good is None else f"the last good checkpoint is {good.name}"
    return TrainingError(
        f"the loss is not finite at step {step}; {kept}",
        hint="lower the learning rate, clip gradients, or train in float32 or bfloat16 instead of float16",
    )


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
