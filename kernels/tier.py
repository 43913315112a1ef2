"""Which compiled implementation runs: the processor decides, GOSSAMER_CPU_TIER overrules it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from ..errors import KernelError
from .extension import compiled

VARIABLE = "GOSSAMER_CPU_TIER"
NAMES = ("avx512bf16", "avx512", "avx2", "neon", "scalar")  # fastest first


@dataclass(frozen=True)
class Tier:
    """One implementation of all operations. `address` is only for `module`."""

    name: str
    address: int
    module: ModuleType


@cache
def available() -> dict[str, Tier]:
    """Tiers that were compiled and that this processor can run, fastest first. Empty without compiled code."""
    module = compiled()
    return {} if module is None else {name: Tier(name, address, module) for name, address in module.tiers()}


@cache
def current() -> Tier | None:
    """The tier in use, None for plain torch. Decided at the first call.

    Raises KernelError when GOSSAMER_CPU_TIER names a tier that does not exist or cannot run here.
    """
    if _forced:
        return _forced[-1]
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in NAMES:
        raise KernelError(f"{VARIABLE} is {wanted!r}, allowed: {', '.join(NAMES)}")
    tiers = available()
    if wanted and tiers and wanted not in tiers:
        raise KernelError(
            f"{VARIABLE} is {wanted!r}, which this processor or build does not have; it has {', '.join(tiers)}"
        )
    return tiers[wanted or next(iter(tiers))] if tiers else None


_forced: list[Tier | None] = []


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Inside the block, tier `name`, or plain torch for None, runs in every thread: for tests and measurements."""
    _forced.append(None if name is None else available()[name])
    current.cache_clear()
    try:
        yield
    finally:
        _forced.pop()
        current.cache_clear()
