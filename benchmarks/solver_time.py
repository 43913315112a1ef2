"""Seconds that pruning takes per matrix of a decoder block: SparseGPT, one round of swaps, and our whole method.

    python benchmarks/solver_time.py                            # a block of width 2048 with an MLP of 5632
    python benchmarks/solver_time.py --width 1024 --mlp 2816 --rounds 5

Inputs are random and correlated; times are medians over the rounds, all contenders in turn within a round. Swaps are
timed with the product that makes the residual current, which our method saves on large matrices.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gossamer.pruning.base import Holdout, LayerStats
from gossamer.pruning.gossamer import Gossamer, Options
from gossamer.pruning.pattern import Unstructured
from gossamer.pruning.registry import get_method
from gossamer.pruning.swap import refine


@dataclass(frozen=True)
class Shape:
    """A matrix of the block: how many of it there are, outputs, inputs."""

    name: str
    count: int
    rows: int
    cols: int


def statistics_of(shape: Shape, tokens: int) -> tuple[torch.Tensor, LayerStats]:
    """A weight and the statistics of correlated inputs, with the dense model's inputs slightly off."""
    generator = torch.Generator().manual_seed(shape.rows + shape.cols)
    weight = torch.randn(shape.rows, shape.cols, generator=generator) * 0.02
    mix = torch.randn(shape.cols, shape.cols, generator=generator) / shape.cols**0.5
    x = torch.randn(tokens, shape.cols, generator=generator) @ mix
    drift = (0.1 * torch.randn(x.shape, generator=generator)) @ weight.T
    gram, held = x.T @ x, tokens // 10
    holdout = Holdout(x[:held].clone(), x[:held] @ weight.T + drift[:held])
    return weight, LayerStats(tokens, gram.diagonal().sqrt(), gram, holdout=holdout, excess=drift.T @ x)


def contenders(weight: torch.Tensor, stats: LayerStats, sparsity: float) -> dict[str, Callable[[], object]]:
    """What is timed: name -> call."""
    sparsegpt = get_method("sparsegpt")
    start, keep = get_method("wanda").prune(weight, stats, Unstructured(sparsity))
    assert stats.gram is not None
    gram, candidates = stats.gram, Options().candidates
    return {
        "SparseGPT": lambda: sparsegpt.prune(weight, stats, Unstructured(sparsity, sparsegpt.scope)),
        "swaps": lambda: refine(start.clone(), keep.clone(), weight, gram, candidates=candidates),
        "ours, whole": lambda: Gossamer().prune(weight, stats, Unstructured(sparsity, Gossamer.scope)),
    }


def measure(shape: Shape, tokens: int, sparsity: float, rounds: int) -> dict[str, float]:
    """Median seconds of every contender."""
    calls = contenders(*statistics_of(shape, tokens), sparsity)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--kv", type=int, default=256, help="outputs of the key and value matrices")
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shapes = [
        Shape("q, o", 2, options.width, options.width),
        Shape("k, v", 2, options.kv, options.width),
        Shape("gate, up", 2, options.mlp, options.width),
        Shape("down", 1, options.width, options.mlp),
    ]
    total: dict[str, float] = {}
    print(f"{torch.get_num_threads()} threads, {options.sparsity:.0%} zeros, median of {options.rounds}\n")
    for shape in shapes:
        found = measure(shape, options.tokens, options.sparsity, options.rounds)
        if not total:
            print(f"| matrix | out x in | {' | '.join(found)} | swaps / SparseGPT |\n|{'---|' * (len(found) + 3)}")
        cells = " | ".join(f"{value:.2f} s" for value in found.values())
        ratio = found["swaps"] / found["SparseGPT"]
        print(f"| {shape.name} | {shape.rows}x{shape.cols} | {cells} | {ratio:.2f} |", flush=True)
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + shape.count * value
    cells = " | ".join(f"{value:.2f} s" for value in total.values())
    print(f"| whole block | | {cells} | {total['swaps'] / total['SparseGPT']:.2f} |")


if __name__ == "__main__":
    main()
