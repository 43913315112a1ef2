"""Measured times on disk: one small JSON file per machine, in the user's cache folder.

The file only saves time. One that is missing, damaged or of another machine is as good as empty, and where none can be
written there is one warning, and every process measures anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from .extension import INTERFACE
from .machine import processor_name

Entry = tuple[float, float]  # microseconds: sparse, dense


@dataclass(frozen=True)
class Machine:
    """What measured times depend on besides operation and shape."""

    processor: str
    tier: str
    threads: int
    version: str
    interface: int

    @classmethod
    def of(cls, tier: str, threads: int) -> Machine:
        """This machine and this version of Gossamer."""
        return cls(_processor(), tier, threads, __version__, INTERFACE)

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"kernels-{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]}.json"


def folder() -> Path:
    """GOSSAMER_CACHE, or `gossamer` in XDG_CACHE_HOME, or in ~/.cache. OSError where there is no home."""
    own = os.environ.get("GOSSAMER_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared and Path(shared).is_absolute():  # the specification says to ignore a relative one
        return Path(shared) / "gossamer"
    try:
        return Path.home() / ".cache" / "gossamer"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def load(machine: Machine) -> dict[str, Entry]:
    """What is known about the machine; empty where nothing is."""
    try:
        document = json.loads((folder() / machine.file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict) or document.get("machine") != asdict(machine):
        return {}
    entries = document.get("microseconds")
    if not isinstance(entries, dict):
        return {}
    return {key: (times[0], times[1]) for key, times in entries.items() if _is_entry(times)}


def save(machine: Machine, entries: dict[str, Entry]) -> None:
    """Adds the entries to the file, which appears whole or not at all. Warns once where that is not possible."""
    document = {"machine": asdict(machine), "microseconds": {**load(machine), **entries}}
    try:
        where = folder()
        where.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=where, prefix=machine.file, suffix=".partial")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1)
            os.replace(partial, where / machine.file)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        _warn(f"{error.filename or 'the cache folder'}: {error.strerror or error}")


def _is_entry(times: Any) -> bool:
    if not isinstance(times, list) or len(times) != 2:
        return False
    return all(isinstance(time, (int, float)) and math.isfinite(time) and time > 0 for time in times)


@cache
def _processor() -> str:
    return processor_name()


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"times of kernels cannot be remembered ({reason}); they are measured anew by every process. Set "
        "GOSSAMER_CACHE to a folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )
