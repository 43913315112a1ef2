"""Time and memory of one training step: sparse deltas against LoRA with as many trained entries.

    python benchmarks/adapter_step.py                      # width 1024, density 0.01, two threads
    python benchmarks/adapter_step.py --width 2048 --density 0.005 --backend dense

A stack of gated MLP blocks of the given width, 256 tokens, float32; forward, backward and one optimizer step. For
times, all methods take steps by turns in one process, so that all of them meet the same machine. Steps of spiel-ag
differ over the interval between two choices of positions, so the time is the mean over an interval, at each of its
steps the fastest of all intervals but the first. For memory, every method runs in a process of its own, which reports
the most that it took. The bars: 1.3 times LoRA's time, 1.1 times its memory. spiel-ag forms the gradient of whole
matrices, of each in one of five steps; "every" does so in every step (`look_every=1`).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

METHODS = ("lora", "static", "spiel-ag", "spiel-ag-every", "spiel-ma")
TIME_BAR, MEMORY_BAR = 1.3, 1.1
INTERVAL = 10  # steps between two choices of positions


def main() -> None:
    options = _options()
    if options.method:
        trained, step = prepared(options, options.method)
        for _ in range(2 * INTERVAL):
            step()
        print(json.dumps({"trained": trained, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    memory = {}
    for method in METHODS:
        words = [sys.executable, __file__, *sys.argv[1:], "--method", method]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        memory[method] = json.loads(done.stdout.splitlines()[-1])
    times = step_times(options)
    print(f"width {options.width}, density {options.density:g}, {options.tokens} tokens, {options.threads} threads")
    for method, figures in memory.items():
        slower, larger = times[method] / times["lora"], figures["peak_mb"] / memory["lora"]["peak_mb"]
        verdict = "" if method == "lora" else _verdict(slower, larger)
        print(
            f"{method:16} {figures['trained']:>9,.0f} entries  {1e3 * times[method]:8.1f} ms ({slower:.2f}x)"
            f"  {figures['peak_mb']:7.1f} MB ({larger:.2f}x){verdict}"
        )


def _verdict(slower: float, larger: float) -> str:
    missed = [name for name, value, bar in (("time", slower, TIME_BAR), ("memory", larger, MEMORY_BAR)) if value > bar]
    return f"  misses the bar of {' and '.join(missed)}" if missed else "  within the bars"


def step_times(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of every method."""
    steps = {method: prepared(options, method)[1] for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(options.intervals * INTERVAL):
        for method, step in steps.items():
            started = time.perf_counter()
            step()
            times[method].append(time.perf_counter() - started)
    return {
        method: statistics.mean(min(found[INTERVAL + i :: INTERVAL]) for i in range(INTERVAL))
        for method, found in times.items()
    }


def prepared(options: argparse.Namespace, method: str) -> tuple[int, Callable[[], None]]:
    """(trained numbers, what takes one training step) of a method."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    import gossamer  # noqa: F401
    from gossamer.finetune.spiel.config import SpielConfig
    from gossamer.finetune.spiel.optimizer import SpielOptimizer

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))

        def forward(self, x: Any) -> Any:
            return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    net = nn.Sequential(*(Block(options.width) for _ in range(options.blocks)))
    entries = round(options.density * options.width**2)
    rank = max(1, round(entries / (2 * options.width)))
    targets = ["gate", "up", "down"]
    if method == "lora":
        model = get_peft_model(net, LoraConfig(r=rank, target_modules=targets))
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    else:
        config = SpielConfig(
            rank_equivalent=rank,
            target_modules=targets,
            policy=method.removeprefix("spiel-").removesuffix("-every"),
            backend=options.backend,
            interval=INTERVAL,
            **({"look_every": 1} if method.endswith("-every") else {}),
        )
        model = get_peft_model(net, config)
        optimizer = SpielOptimizer(model, 1e-4, 1000)
    x = torch.randn(options.tokens, options.width)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return sum(p.numel() for p in model.parameters() if p.requires_grad), step


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--intervals", type=int, default=6, help="between two choices of positions, of 10 steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=["csr", "dense", "weight"])
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
