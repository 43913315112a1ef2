"""What happens around a step: masks on, the loss looked at before it is used, metrics written, Ctrl-C noticed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..errors import TrainingError
from .masked import MaskGuard, agree_on_masks
from .resuming import add_to_history, kept_history, newest_checkpoint
from .training import StepDone

if TYPE_CHECKING:
    from .trainer import MaskedTrainer

_KNOWN = ("step", "loss", "lr", "sparsity", "tokens", "tokens_per_s")


def last_good(folder: Path) -> str:
    """What a run in `folder` that cannot go on has left, in words: only what was proved is ever saved."""
    good = newest_checkpoint(folder)
    return (
        "no checkpoint was saved before"
        if good is None
        else f"the last good checkpoint is {good.name} in {good.parent}"
    )


class Bookkeeping(TrainerCallback):
    """Our part in the Trainer's loop; called after the callbacks of the method."""

    def __init__(self, trainer: MaskedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The optimizer is what it will be, and weights are sharded where they will be: now masks fit."""
        trainer = self.trainer
        trainer.guard = MaskGuard(trainer.network, trainer.masks)
        if args.world_size > 1:  # in a group of processes each may also train a model of its own
            agree_on_masks(trainer.guard)
        inner: Any = trainer.optimizer
        while hasattr(inner, "optimizer"):  # accelerate's wrapper
            inner = inner.optimizer
        trainer.guard.watch(inner)
        for callback in trainer.config.callbacks:
            if hasattr(callback, "take_guard"):  # a method that moves masks
                callback.take_guard(trainer.guard, inner, state.global_step)
        trainer.resumed_from = state.global_step
        trainer.started = time.monotonic()
        if args.should_save:
            trainer.history = kept_history(trainer.config.folder, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Before weights change: those of the last good step stay."""
        trainer = self.trainer
        loss = torch.stack(trainer.micro_losses).sum()
        trainer.micro_losses.clear()
        pressed = torch.tensor(float(trainer.pressed()), device=loss.device)
        flags = torch.stack([(~torch.isfinite(loss)).float(), pressed])
        if args.world_size > 1:
            torch.distributed.all_reduce(flags)
        bad, stop = (bool(flag) for flag in flags.tolist())
        if bad:
            raise self._not_finite(state.global_step + 1)
        trainer.interrupted = trainer.interrupted or stop

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        every, interrupted = self.trainer.config.save_every, self.trainer.interrupted
        last = state.global_step >= self.trainer.total
        if interrupted or (every and (last or state.global_step % every == 0)):
            control.should_save = True
        if interrupted or last:
            control.should_log = True
        if interrupted:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        """One line of metrics.jsonl, and the watcher told."""
        trainer = self.trainer
        if logs is None or "loss" not in logs:
            return
        done = state.global_step - trainer.resumed_from
        seconds = time.monotonic() - trainer.started
        per_step = trainer.config.batch * trainer.length
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "tokens": state.global_step * per_step,
            "tokens_per_s": round(done * per_step / max(seconds, 1e-9), 1),
        }
        if len(trainer.guard):
            line["sparsity"] = round(trainer.guard.sparsity, 8)
        line |= {key: value for key, value in logs.items() if key not in ("loss", "learning_rate", "epoch")}
        trainer.history.append(line)
        if not args.should_save:
            return
        add_to_history(trainer.config.folder, line)
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

    def _not_finite(self, step: int) -> TrainingError:
        return TrainingError(
            f"the loss is not finite at step {step}; {last_good(self.trainer.config.folder)}",
            hint="lower the learning rate, clip gradients, or train in float32 or bfloat16 instead of float16, and "
            "start again with --overwrite: --resume takes no other settings",
        )
