"""Kernel or dense product? Measured once per machine, operation, shape and sparsity, and remembered on disk.

Below some sparsity, on some shapes, the sparse kernel is slower than the dense one: a mask costs bytes and work, too.
Where that is depends on the processor, so nobody guesses. Nothing is measured on import.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import KernelError
from .arguments import name
from .bench.cases_bitmask import bitmask_case
from .bench.cases_dense import dense_case
from .bench.cases_int8 import int8_case
from .bench.rounds import Contender, Times, run_rounds, summary
from .choice_cache import Entry, Machine, load, save
from .memory import empty_weight
from .tier import current

VARIABLE = "GOSSAMER_DISPATCH"
MODES = ("measured", "sparse", "dense")
SLOWER = 1.03  # a sparse kernel saves memory as well, so it may take this much of dense's time

# What `choose` can decide: op -> from x [1, cols], weight [rows, cols] and mask to the kernel's call.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Contender]] = {"bitmask": bitmask_case, "int8": int8_case}

_STEP = 20  # sparsities are rounded to 1 / 20
_MOST_BYTES = 32 << 20  # of dense weight; of larger ones only so many rows are measured
_BLOCK = 64  # rows of random numbers, repeated: drawing all of them would take longer than the measurement
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 10, 400, 0.3
_FEWEST_ROUNDS = 4  # however late it is
_AGREE = 1.05  # the three best times of a contender lie within this, or something else was running
_HELD_UP = 1.5  # and so it was when all threads take this many times as long as one

_lock = threading.Lock()
_known: dict[Machine, dict[str, Entry]] = {}


@dataclass(frozen=True)
class Choice:
    """`sparse`: run the sparse kernel, else the dense one. Times in microseconds; NaN where nothing was measured."""

    sparse: bool
    sparse_us: float
    dense_us: float
    measured: bool


def choose(op: str, rows: int, cols: int, dtype: torch.dtype, density: float) -> Choice:
    """What to run for a weight [rows, cols] of `dtype` with this share of kept entries, one row of x, torch's threads.

    The first question about a shape costs up to half a second of measurement, later ones a look into a table, which
    is kept per machine in the user's cache folder. Without compiled kernels the answer is dense. GOSSAMER_DISPATCH set
    to `sparse` or `dense` is the answer to everything. Raises KernelError for what is not an operation or a matrix.
    """
    if op not in OPERATIONS:
        raise KernelError(f"operation {op!r} is unknown, allowed: {', '.join(OPERATIONS)}")
    if rows < 1 or cols < 1 or not 0.0 <= density <= 1.0:
        raise KernelError(f"a weight [{rows}, {cols}] of density {density}: lengths start at 1, densities end at 1")
    mode = os.environ.get("GOSSAMER_DISPATCH") or MODES[0]
    if mode not in MODES:
        raise KernelError(f"{VARIABLE} is {mode!r}, allowed: {', '.join(MODES)}")
    tier = current()
    if mode != "measured" or tier is None:
        return Choice(mode == "sparse", math.nan, math.nan, measured=False)
    sparsity = round(_STEP * (1.0 - density)) / _STEP
    key = f"{op} {rows}x{cols} {name(dtype)} {sparsity:.0%}"
    with _lock:
        # Asked in here: a thread that begins while another one measures with one thread would hear of one.
        machine = Machine.of(tier.name, torch.get_num_threads())
        if machine not in _known:
            _known[machine] = load(machine)
        entries = _known[machine]
        if key not in entries:
            entries[key], settled = _measure(op, rows, cols, dtype, sparsity)
            if settled:
                save(machine, {key: entries[key]})
        sparse_us, dense_us = entries[key]
    return Choice(sparse_us <= SLOWER * dense_us, sparse_us, dense_us, measured=True)


def _measure(op: str, rows: int, cols: int, dtype: torch.dtype, sparsity: float) -> tuple[Entry, bool]:
    """(sparse, dense) in microseconds for all rows, and whether the machine was quiet enough to keep them."""
    # Models are loaded under torch.device("meta") and with other default dtypes.
    with torch.inference_mode(), torch.device("cpu"):
        part = min(rows, max(1, _MOST_BYTES // (cols * dtype.itemsize)))
        contenders = _contenders(op, part, cols, dtype, sparsity)
        warm = {contender.name: contender.call for contender in _contenders(op, 16, 64, dtype, sparsity)}
        with _one_thread():
            alone = _times(contenders, warm, time.thread_time)
        together = _times(contenders, warm, time.perf_counter) if torch.get_num_threads() > 1 else alone
    quiet = _settled(together) and all(min(together[key]) <= _HELD_UP * min(alone[key]) for key in alone)
    times = together if quiet else alone
    sparse_us, dense_us = (summary(times[which.name]).decile * rows / part for which in contenders)
    return (sparse_us, dense_us), quiet


def _times(contenders: list[Contender], warm: Mapping[str, Callable[[], Tensor]], clock: Callable[[], float]) -> Times:
    after = _enough(time.monotonic() + _SECONDS)
    return run_rounds(contenders, _MOST_ROUNDS, warm=warm, after=after, clock=clock)


@contextmanager
def _one_thread() -> Iterator[None]:
    """While other programs run, a call on all cores ends when the last of them is free, and its time tells little.

    One thread's own time does not count what it waits for a core. It is longer, but which contender is faster shows.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _contenders(op: str, rows: int, cols: int, dtype: torch.dtype, sparsity: float) -> list[Contender]:
    """The sparse kernel and our dense one on the same random weight."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(rows, _BLOCK), cols, generator=generator, dtype=torch.float32).to(dtype)
    kept = torch.rand(block.shape, generator=generator, dtype=torch.float32) >= sparsity
    x = torch.randn(1, cols, generator=generator, dtype=torch.float32).to(dtype)
    index = torch.arange(rows) % len(block)
    weight = empty_weight(rows, cols, dtype=dtype).copy_(block[index])
    return [OPERATIONS[op](x, weight, kept[index]), dense_case(x, weight)]


def _enough(deadline: float) -> Callable[[int, Times], bool]:
    def after(done: int, times: Times) -> bool:
        late = time.monotonic() > deadline and done >= _FEWEST_ROUNDS
        return late or (done >= _LEAST_ROUNDS and _settled(times))

    return after


def _settled(times: Times) -> bool:
    """Each contender's best time was seen again, and again."""
    best = [sorted(taken)[:3] for taken in times.values()]
    return all(len(three) == 3 and three[2] <= _AGREE * three[0] for three in best)
