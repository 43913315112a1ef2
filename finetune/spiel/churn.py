"""How much the positions move, as a figure of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class ChurnLog(TrainerCallback):
    """Makes the optimizer, and writes how many entries the last choice of positions replaced into the metrics."""

    def __init__(self, inner: Callable[[Any], Any] | None) -> None:
        self.inner = inner
        self._made: Any = None
        self._told = 0

    def make(self, model: Any) -> Any:
        assert self.inner is not None
        self._made = self.inner(model)
        return self._made

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed optimizer brings its history: what was told before the checkpoint is not told again."""
        last = max((line["step"] for line in state.log_history if "loss" in line), default=0)
        self._told = sum(one["update"] <= last for one in self._history())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        new = self._history()[self._told :]
        self._told += len(new)
        if new and logs is not None:
            logs["churn"] = sum(one["replaced"] for one in new) / new[-1]["entries"]

    def figures(self) -> dict[str, Any]:
        return {"reselections": self._history()} if self._history() else {}

    def _history(self) -> list[dict[str, Any]]:
        return [] if self._made is None else list(self._made.history)
