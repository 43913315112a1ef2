"""Sparse modules have the state dicts of dense ones: how those are read and given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

_lazy: ContextVar[bool] = ContextVar("lazy_weights", default=False)


@contextmanager
def lazy_weights() -> Iterator[None]:
    """Inside the block, `state_dict()` of this thread has each `weight` as a PackedWeight, expanded when it is read."""
    token = _lazy.set(True)
    try:
        yield
    finally:
        _lazy.reset(token)


def lazy_state() -> bool:
    """Whether `lazy_weights` is in force."""
    return _lazy.get()


def take_state(
    key: str,
    wanted: tuple[int, ...],
    take: Callable[[Tensor], str | None],
    state_dict: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Gives entry `key`, of shape `wanted`, to `take`; reports as nn.Module does what is missing or does not fit."""
    if key not in state_dict:
        if strict:
            missing_keys.append(key)
        return
    if key in unexpected_keys:
        unexpected_keys.remove(key)
    given = state_dict[key]
    if given.shape != wanted:
        error_msgs.append(f"{key}: shape {list(given.shape)}, the sparse module has {list(wanted)}")
        return
    fault = take(given)
    if fault is not None:
        error_msgs.append(f"{key}: {fault}")
