"""What modules that skip need to know of the call of the model that they are in: dense or sparse tokens, and whose.

A model's hook (compress/activation/hook.py) sets it; modules ask. Outside any call, few rows are sparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Neurons(Protocol):
    """The neurons of the sequences of one call, row by row."""

    def observe(self, mlp: str, inner: Tensor) -> None:
        """inner [batch, tokens, neurons] of a pass that computed all of them."""
        ...

    def chosen(self, mlp: str, batch: int) -> list[Tensor | None] | None:
        """int32 [n], rising, for each of `batch` sequences, None for all neurons; None where they are unknown."""
        ...


@dataclass(frozen=True)
class Step:
    """One call of a model. `dense`: its tokens skip nothing. `watched`: MLPs compute and show all their neurons."""

    dense: bool
    watched: bool = False
    neurons: Neurons | None = None


_OUTSIDE = Step(dense=False)
_step: ContextVar[Step] = ContextVar("step", default=_OUTSIDE)


def current_step() -> Step:
    """The call that this thread is in; compiled code knows none."""
    return _OUTSIDE if torch.compiler.is_compiling() else _step.get()


def enter(step: Step) -> Token[Step]:
    """Begin a call; `leave` ends it."""
    return _step.set(step)


def leave(token: Token[Step]) -> None:
    """End the call that `enter` began."""
    _step.reset(token)


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Inside the block, modules are in `step`."""
    token = enter(step)
    try:
        yield
    finally:
        leave(token)
