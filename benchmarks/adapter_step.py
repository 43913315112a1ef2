"""Time and memory of one training step: sparse deltas against LoRA with as many trained entries.

    python benchmarks/adapter_step.py                      # width 1024, density 0.01, two threads
    python benchmarks/adapter_step.py --width 2048 --density 0.005 --backend dense

A stack of gated MLP blocks of the given width, 256 tokens, float32; forward, backward and one optimizer step. Every
method runs in a process of its own, the processes take turns, and each reports the time of a step and the memory that
training added to what the frozen model takes. Steps of spiel-ag differ over the interval between two choices of
positions, so the time is the mean over an interval, at each of its steps the fastest of all intervals but the first.
The bars: 1.3 times LoRA's time, 1.1 times its memory. spiel-ag forms the gradient of whole matrices, of each in one of
five steps; "every" does so in every step (`look_every=1`).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

METHODS = ("lora", "static", "spiel-ag", "spiel-ag-every", "spiel-ma")
TIME_BAR, MEMORY_BAR = 1.3, 1.1
INTERVAL = 10  # steps between two choices of positions


def main() -> None:
    options = _options()
    if options.method:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method in METHODS:
            words = [sys.executable, __file__, *sys.argv[1:], "--method", method]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[method].append(json.loads(done.stdout.splitlines()[-1]))
    best = {m: {key: min(run[key] for run in runs) for key in runs[0]} for m, runs in found.items()}
    print(f"width {options.width}, density {options.density:g}, {options.tokens} tokens, {options.threads} threads")
    for method, figures in best.items():
        slower, larger = (figures[key] / best["lora"][key] for key in ("step_ms", "peak_mb"))
        verdict = "" if method == "lora" else _verdict(slower, larger)
        print(
            f"{method:16} {figures['trained']:>9,.0f} entries  {figures['step_ms']:8.1f} ms ({slower:.2f}x)"
            f"  {figures['peak_mb']:7.1f} MB ({larger:.2f}x){verdict}"
        )


def _verdict(slower: float, larger: float) -> str:
    missed = [name for name, value, bar in (("time", slower, TIME_BAR), ("memory", larger, MEMORY_BAR)) if value > bar]
    return f"  misses the bar of {' and '.join(missed)}" if missed else "  within the bars"


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One method: the mean over an interval of the fastest steps."""
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
    if options.method == "lora":
        model = get_peft_model(net, LoraConfig(r=rank, target_modules=targets))
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    else:
        policy = options.method.removeprefix("spiel-").removesuffix("-every")
        looks = {"look_every": 1} if options.method.endswith("-every") else {}
        config = SpielConfig(
            rank_equivalent=rank,
            target_modules=targets,
            policy=policy,
            backend=options.backend,
            interval=INTERVAL,
            **looks,
        )
        model = get_peft_model(net, config)
        optimizer = SpielOptimizer(model, 1e-4, 1000)
    x = torch.randn(options.tokens, options.width)
    before = _resident()
    times = []
    for _ in range(options.steps):
        started = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "trained": trained,
        "step_ms": statistics.mean(min(times[INTERVAL + i :: INTERVAL]) for i in range(INTERVAL)) * 1e3,
        "peak_mb": _resident(),
        "added_mb": _resident() - before,
    }


def _resident() -> float:
    """Largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=["csr", "dense", "weight"])
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
