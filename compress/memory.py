"""Resident memory: what this process holds, its peak, and giving freed pages back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGE = 1 << 18
KEPT = 1 << 25  # glibc's largest
SPARE = 1 << 30
_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Anonymous plus shared resident memory (RssAnon + RssShmem) in bytes.

    File-backed pages are left out: the system can drop them at any time. Where /proc is absent, the largest resident
    size so far (ru_maxrss) stands in.
    """
    try:
        text = _STATUS.read_text()
    except OSError:
        return _largest_resident()
    return sum(int(match) for match in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text)) * 1024


def _largest_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows has neither /proc nor getrusage
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def existing_parent(path: Path) -> Path:
    """The nearest folder (or file) above `path` that exists."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def free_disk(path: Path) -> int:
    """Bytes that this user may still write where `path` will be."""
    return shutil.disk_usage(existing_parent(path)).free


class PeakMemory:
    """Context manager: samples `resident_bytes` every `interval` seconds; `.peak` holds the largest value seen."""

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, resident_bytes())
            if self._stop.wait(self.interval):
                return

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def release() -> None:
    """Return freed heap pages to the system.

    glibc keeps them otherwise, and the peak of a long run creeps up block by block through fragmentation.
    """
    gc.collect()
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Inside, garbage collections leave out everything that exists already.

    `release` after every block would otherwise look at millions of objects that imports left. Whoever froze objects
    before keeps them frozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def bound_heap() -> None:
    """Let glibc give every block of LARGE bytes or more back to the system as soon as it is freed.

    By default its threshold grows up to 32 MiB with use, and freed tensors of that size stay as holes in the heap:
    the resident size then creeps up with every layer. A setting of the user's own (MALLOC_MMAP_THRESHOLD_) is kept.
    """
    _thresholds(LARGE, LARGE)


@contextmanager
def reused_heap() -> Iterator[None]:
    """Inside, freed blocks of at most KEPT bytes stay with the process and are used again; then the heap is bound.

    For work that asks for the same sizes over and over. Under `bound_heap` the system zeroes every one of them page by
    page: that was a quarter of a small model's training and a sixth of a calibration, for a tenth less memory.
    """
    _thresholds(KEPT, SPARE)
    try:
        yield
    finally:
        bound_heap()
        release()


def _thresholds(mapped: int, spare: int) -> None:
    """Bytes from which a block is given back alone, and free bytes at the heap's end from which they are."""
    set_option = getattr(_libc(), "mallopt", None)
    if set_option is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_option(M_MMAP_THRESHOLD, mapped)
        set_option(M_TRIM_THRESHOLD, spare)


def _libc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:  # musl and others: nothing to trim
        return None
