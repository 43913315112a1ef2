"""How times are taken: interleaved rounds, every weight from memory. The only timing loop; `choice.py` uses it, too.

Every round calls each contender once, in another order, so that what else happens on the machine meets all of them
alike. Before a call a large unrelated tensor is read, which leaves nothing of the weight in any cache, as in a model
whose other layers have run meanwhile. Then the same operation may run on a tiny matrix: so the code is in the cache, as
between the layers of a model. Best deciles count: a call on several threads ends with the slowest, so while another
process is on one of the cores a median tells about that process.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ..machine import last_cache_bytes
from ..memory import empty_weight

LEAST_UNRELATED, MOST_UNRELATED = 80 << 20, 512 << 20
Times = dict[str, list[float]]


@dataclass
class Contender:
    """`call()` is what is timed, inside `setting()`."""

    name: str
    call: Callable[[], Tensor]
    setting: Callable[[], AbstractContextManager[object]] = field(default=nullcontext, kw_only=True)


@dataclass(frozen=True)
class Timing:
    """Microseconds over the rounds. With fewer than 20 rounds the decile is the best."""

    best: float
    decile: float
    median: float


def run_rounds(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    warm: Mapping[str, Callable[[], Tensor]] | None = None,
    after: Callable[[int, Times], bool] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Microseconds of every call by name. `warm`: by name, what brings a contender's code into the cache.

    after(rounds done, times) is called after each round and may end the measurement by returning True. clock: in
    seconds; `time.thread_time` leaves out the time that other programs had the core, and sees the calling thread only.
    """
    warm = warm or {}
    times: Times = {contender.name: [] for contender in contenders}
    unrelated = empty_weight(unrelated_bytes() // 4, dtype=torch.float32).fill_(1.0)
    order = random.Random(0)
    for done in range(1, rounds + 1):
        for contender in order.sample(contenders, len(contenders)):
            with contender.setting():
                unrelated.amax()
                if contender.name in warm:
                    warm[contender.name]()
                start = clock()
                contender.call()
                times[contender.name].append((clock() - start) * 1e6)
        if after is not None and after(done, times):
            break
    return times


def summary(times: Sequence[float]) -> Timing:
    """Best, best decile and median."""
    ordered = sorted(times)
    decile = ordered[max(0, len(ordered) // 10 - 1)]
    return Timing(round(ordered[0], 1), round(decile, 1), round(statistics.median(ordered), 1))


@cache
def unrelated_bytes() -> int:
    """What is read before each call: more than twice the last cache, within reason where that is huge."""
    return min(max(LEAST_UNRELATED, last_cache_bytes() * 5 // 2), MOST_UNRELATED)
