"""Progressive N:M flow inside transformers' Trainer: the global step drives the schedule."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..pruning.flow import Flow


class FlowSteps(TrainerCallback):
    """Tells `flow` of every optimizer step and adds its figures to the log: flips, beta, sparsity.

    The masks of the matrices in `flow` move, so `train` gets no masks of theirs. What a checkpoint must hold is in
    persistent buffers of the model (`pruning/flow_weight.py`).
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
        """After a checkpoint was loaded, if there is one."""
        self.flow.reread()
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        self.flow.watch(optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.flow.at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Before a checkpoint is saved."""
        self.flow.at(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        if logs is not None and "loss" in logs:
            logs |= {"flips": self.flow.flip_rate(), "beta": self.flow.beta, "sparsity": self.flow.sparsity}
