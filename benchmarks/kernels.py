"""Speed of the CPU kernels against the best dense product that this machine offers, shape by shape.

    python benchmarks/kernels.py --threads 2 --rounds 60 --json kernels.json --markdown kernels.md

One row of x, bfloat16, every weight from memory: a large unrelated tensor is read before each timed call. Then the same
operation runs on a matrix of 16 x 64, so that the code is in the cache, as between the layers of a model, but no
weight; --cold-code leaves that out. Every round calls each contender once, in another order. Times are best deciles,
because another process on a core makes two-thread medians meaningless; medians are in the JSON. A contender whose
result is wrong has no speed, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from kernels_cases import Case, cases
from torch import Tensor

from gossamer.kernels import tier
from gossamer.kernels.memory import empty_weight

SHAPES = "4096x4096,1024x4096,14336x4096,4096x14336"
EVICT_BYTES = 80 << 20
READ_BYTES = 128 << 20


@dataclass
class Timing:
    """Microseconds over the rounds."""

    best: float
    decile: float
    median: float


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, text.split("x"))) for text in options.shapes.split(",")]
    with tier.forced(options.tier or next(iter(tier.available()), None)), torch.inference_mode():
        results = [measure(rows, cols, options.rounds, options.cold_code) for rows, cols in shapes]
    report = {"machine": machine(options), "shapes": results}
    text = markdown(report)
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        Path(options.markdown).write_text(text, encoding="utf-8")
    return int(any(entry["error"] for result in results for entry in result["cases"]))


def measure(rows: int, cols: int, rounds: int, cold_code: bool) -> dict:
    """All contenders of one weight [rows, cols], in rounds."""
    evict = torch.ones(EVICT_BYTES // 8, dtype=torch.int64)
    far = empty_weight(READ_BYTES // 8, dtype=torch.int64).fill_(1)
    found = cases(rows, cols)
    small = {case.name: case.call for case in cases(16, 64)}
    wrong = {case.name: case.fault() for case in found}
    runs: dict[str, list[float]] = {case.name: [] for case in found if not wrong[case.name]}
    reads: list[float] = []
    order = random.Random(0)
    for _ in range(rounds):
        reads.append(_time(evict, far.sum, None))
        for case in order.sample([case for case in found if case.name in runs], len(runs)):
            with case.setting():
                runs[case.name].append(_time(evict, case.call, None if cold_code else small[case.name]))
    bandwidth = READ_BYTES / _summary(reads).decile / 1e3
    timings = {name: _summary(times) for name, times in runs.items()}
    dense = [timings[case.name].decile for case in found if case.dense and case.name in timings]
    entries = [_entry(case, timings.get(case.name), wrong[case.name], min(dense), bandwidth) for case in found]
    return {"rows": rows, "cols": cols, "read_gb_s": round(bandwidth, 1), "cases": entries}


def _entry(case: Case, timing: Timing | None, error: str, dense: float, bandwidth: float) -> dict:
    entry = {"name": case.name, "dense": case.dense, "bytes": case.bytes, "must": case.must, "error": error}
    if timing is None:
        return entry
    rate = case.bytes / timing.decile / 1e3
    speedup = {"speedup": round(dense / timing.decile, 2), "gb_s": round(rate, 1)}
    return {**entry, **speedup, "percent_of_read": round(100 * rate / bandwidth), "us": asdict(timing)}


def _time(evict: Tensor, call: Callable[[], Tensor], before: Callable[[], Tensor] | None) -> float:
    evict.sum()
    if before is not None:
        before()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _summary(times: list[float]) -> Timing:
    ordered = sorted(times)
    return Timing(round(ordered[0], 1), round(ordered[len(ordered) // 10], 1), round(statistics.median(ordered), 1))


def machine(options: argparse.Namespace) -> dict:
    current = options.tier or next(iter(tier.available()), "torch")
    return {
        "processor": _processor(),
        "tier": current,
        "threads": options.threads,
        "rounds": options.rounds,
        "code": "cold" if options.cold_code else "warm",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def markdown(report: dict) -> str:
    told = report["machine"]
    lines = [
        f"{told['processor']}, tier {told['tier']}, {told['threads']} threads, torch {told['torch']}, {told['date']}; "
        f"best decile of {told['rounds']} rounds, {told['code']} code. Speedup: over the fastest dense product.",
    ]
    for result in report["shapes"]:
        head = f"{result['rows']} x {result['cols']} (read bandwidth {result['read_gb_s']} GB/s)"
        lines += ["", f"| {head} | us | GB/s | of bandwidth | speedup | must |", "|---|---|---|---|---|---|"]
        lines += [_line(entry) for entry in result["cases"]]
    return "\n".join(lines) + "\n"


def _line(entry: dict) -> str:
    if entry["error"]:
        return f"| {entry['name']} | wrong result: {entry['error']} | | | | |"
    cells = [entry["name"], f"{entry['us']['decile']:.0f}", entry["gb_s"], f"{entry['percent_of_read']} %"]
    verdict = ""
    if entry["must"]:
        verdict = f"{entry['must']} {'met' if entry['speedup'] >= entry['must'] else 'MISSED'}"
    return "| " + " | ".join(map(str, [*cells, f"{entry['speedup']:.2f}", verdict])) + " |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default=SHAPES, help="out x in, comma separated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--tier", choices=list(tier.available()), help="default: the fastest of this processor")
    parser.add_argument("--cold-code", action="store_true", help="do not run the code before it is timed")
    parser.add_argument("--json", help="write figures to this file")
    parser.add_argument("--markdown", help="write the tables to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
