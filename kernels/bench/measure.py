"""Contenders compared: every result checked first, then timed in rounds, beside the machine's read bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..arguments import name
from ..machine import processor_name
from ..memory import empty_weight
from ..tier import current
from .case import Checked
from .cases import cases
from .cases_token import small_cases, token_cases
from .rounds import Contender, Timing, run_rounds, summary

READ_BYTES = 64 << 20
_READ = "read"
_SMALL = (128, 64), (16, 64)  # an MLP has more rows than columns; of the others the second one counts


def measure_shape(
    rows: int, cols: int, dtype: torch.dtype, rounds: int, each: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """All contenders of a weight [rows, cols] on torch's threads. each(rounds done) is called after every round."""
    with torch.inference_mode():
        small = {case.name: case.call for shape in _SMALL for case in cases(*shape, dtype)}
        title = f"{rows} x {cols}"
        return {"title": title, "rows": rows, "cols": cols, **compare(cases(rows, cols, dtype), small, rounds, each)}


def measure_token(dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """What a token needs besides products with weights: one entry per operation, in the form of a shape's."""
    with torch.inference_mode():
        small = {case.name: case.call for case in small_cases(dtype)}
        return [{"title": title, **compare(found, small, rounds)} for title, found in token_cases(dtype).items()]


def compare(
    found: Sequence[Checked],
    warm: Mapping[str, Callable[[], Tensor]],
    rounds: int,
    each: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Plain data: one entry per case. A case whose result is wrong has no time, only an error.

    Speedups refer to the fastest dense product (or way of torch) of the same list, those of dense products to the
    fastest of the others, those of an MLP to three times the time of the fastest.
    """
    wrong = {case.name: case.fault() for case in found}
    far = empty_weight(READ_BYTES // 4, dtype=torch.float32).fill_(1.0)
    right = [case for case in found if not wrong[case.name]]
    times = run_rounds(
        [Contender(_READ, far.amax), *right],
        rounds,
        warm=warm,
        after=lambda done, _: bool(each and each(done)),
    )
    timings = {name: summary(taken) for name, taken in times.items()}
    bandwidth = READ_BYTES / timings.pop(_READ).best / 1e3  # the most that was seen: what there is to reach
    dense = {case.name: timings[case.name].decile for case in right if case.dense}
    entries = [_entry(case, timings.get(case.name), wrong[case.name], dense, bandwidth) for case in found]
    return {"read_gb_s": round(bandwidth, 1), "cases": entries}


def machine(rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures belong to."""
    tier = current()
    return {
        "processor": processor_name(),
        "tier": "torch" if tier is None else tier.name,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "dtype": name(dtype),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }


def _entry(case: Checked, timing: Timing | None, error: str, dense: Mapping[str, float], bandwidth: float) -> dict:
    entry: dict[str, Any] = {"name": case.name, "dense": case.dense, "bytes": case.bytes, "error": error}
    entry |= {"must": case.must, "must_share": case.must_share}
    if timing is None:
        return entry
    others = [time for other, time in dense.items() if other != case.name]
    speedup = case.products * min(others) / timing.decile if others else None
    rate = case.bytes / timing.decile / 1e3
    return {
        **entry,
        "us": asdict(timing),
        "gb_s": round(rate, 1),
        "share_of_read": round(rate / bandwidth, 3),
        "speedup": None if speedup is None else round(speedup, 3),
    }
