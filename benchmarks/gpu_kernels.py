"""Speed of the Triton kernels against the dense product of cuBLAS (or rocBLAS) and of torch.compile, on a GPU.

    python benchmarks/gpu_kernels.py --rounds 50 --json gpu.json

One row of x, bfloat16. Every call is recorded as a CUDA graph, as in a decoding loop, so that launches from Python do
not count; before every timed call a large buffer is written, so that no weight is in the second-level cache. Times are
medians between two events. Bandwidth is that of a copy of 1 GiB, reads and writes together. A contender whose result is
wrong has no speed, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv.dispatch import bitmask_gemv, pack
from gossamer.kernels.channel_gemv.dispatch import channel_gemv
from gossamer.kernels.dual_gemv import gpu_layout
from gossamer.kernels.dual_gemv import triton as dual
from gossamer.kernels.neuron_mlp import triton as neuron
from gossamer.kernels.nm_gemv import dispatch as nm

SHAPES = "4096x4096,1024x4096,14336x4096,4096x14336"
DENSE = ("cublas", "torch.compile")


@dataclass
class Case:
    """A call, what it should give, and the bytes of weights it has to read."""

    call: Callable[[], Tensor]
    truth: Tensor
    bytes: int


@dataclass
class Result:
    shape: str
    name: str
    microseconds: float | None
    speedup: float | None = None
    bandwidth_share: float | None = None


def main() -> int:
    options = _options()
    if not torch.cuda.is_available():
        print("no GPU")
        return 1
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    bandwidth = copy_bandwidth()
    results = []
    with torch.inference_mode():
        for shape in options.shapes.split(","):
            rows, cols = map(int, shape.split("x"))
            results += measure(shape, cases(rows, cols), options.rounds, flush, bandwidth)
            torch.cuda.empty_cache()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_per_s": bandwidth / 1e9}
    print(f"{machine['device']}, {bandwidth / 1e9:.0f} GB/s\n\n| out x in | kernel | us | speed-up | of bandwidth |")
    print("|---|---|---:|---:|---:|")
    for one in results:
        figures = (one.microseconds, one.speedup, one.bandwidth_share)
        cells = ["wrong"] * 3 if None in figures else [f"{figures[0]:.1f}", f"{figures[1]:.2f}", f"{figures[2]:.0%}"]
        print(f"| {one.shape} | {one.name} | {' | '.join(cells)} |")
    if options.json:
        report = {"machine": machine, "results": [asdict(one) for one in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(one.microseconds is None for one in results))


def cases(rows: int, cols: int) -> dict[str, Case]:
    torch.manual_seed(0)
    weight = (torch.randn(rows, cols) / cols**0.5).bfloat16()
    x_host = torch.randn(1, cols).bfloat16()
    x, on_gpu = x_host.cuda(), weight.cuda()
    found = {}
    compiled = torch.compile(functional.linear, mode="max-autotune-no-cudagraphs")
    truth = x.float() @ on_gpu.float().t()
    found["cublas"] = Case(lambda: functional.linear(x, on_gpu), truth, on_gpu.nbytes)
    found["torch.compile"] = Case(lambda: compiled(x, on_gpu), truth, on_gpu.nbytes)

    def masked(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bits = bitmask.pack_bits(mask)
        return bits, bitmask.compress(weight, bits), x.float() @ (weight * mask).cuda().float().t()

    for percent in (50, 70, 80):
        bits, values, truth = masked(torch.rand(rows, cols) >= percent / 100)
        packed = pack(bits, values, cols).cuda()
        found[f"bitmask {percent} %"] = Case(lambda p=packed: bitmask_gemv(x, p, rows), truth, packed.nbytes)
    rank = torch.rand(rows, cols // 4, 4).argsort(-1).argsort(-1)
    bits, values, truth = masked((rank < 2).flatten(1))
    codes, slots = bits.cuda(), nm.pack(bits, values, cols, 2, 4).cuda()
    found["2:4"] = Case(lambda: nm.nm_gemv(x, codes, slots, 2, 4), truth, codes.nbytes + slots.nbytes)

    weight_t = weight.t().contiguous().cuda()
    for percent in (50, 65, 80):
        threshold = x.float().abs().flatten().quantile(percent / 100).expand(cols).contiguous()
        active = (x.float().abs() > threshold).flatten()
        truth = (x.float() * active) @ on_gpu.float().t()
        size = int(active.sum()) * rows * 2
        found[f"active {100 - percent} %"] = Case(lambda t=threshold: channel_gemv(x, weight_t, t), truth, size)
    bits, values, _ = masked(torch.rand(rows, cols) >= 0.5)
    matrix = gpu_layout.DualMatrix(*(part.cuda() for part in gpu_layout.make(bits, values, cols)))
    half = x.float().abs().flatten().quantile(0.5).expand(cols).contiguous()
    kept = (weight * bitmask.unpack_bits(bits, cols)).cuda().float()
    truth = (x.float() * (x.float().abs() > half)) @ kept.t()
    size = sum(part.nbytes for part in matrix) // 2
    found["dual 50 % x 50 %"] = Case(lambda: dual.dual_gemv(x, 1, matrix, half, rows), truth, size)
    return found | mlp_cases(rows, cols, x)


def mlp_cases(inter: int, hidden: int, x: Tensor) -> dict[str, Case]:
    """40 % of the neurons of an MLP, where the shape is that of one; the dense one has its own baseline."""
    if inter <= hidden:
        return {}
    gate, up, down_t = ((torch.randn(inter, hidden, device="cuda") / hidden**0.5).bfloat16() for _ in range(3))
    active = torch.randperm(inter, device="cuda")[: inter * 2 // 5].sort().values.int()

    def exact(which: Tensor) -> Tensor:
        g, u, d = (part[which].float() for part in (gate, up, down_t))
        return (functional.silu(x.float() @ g.t()) * (x.float() @ u.t())) @ d

    everything = torch.arange(inter, device="cuda")
    size = 3 * gate.nbytes

    def dense() -> Tensor:
        return (functional.silu(functional.linear(x, gate)) * functional.linear(x, up)) @ down_t

    return {
        "mlp cublas": Case(dense, exact(everything), size),
        "mlp 40 %": Case(
            lambda: neuron.neuron_mlp(x, 1, gate, up, down_t, active),
            exact(active.long()),
            size * active.numel() // inter,
        ),
    }


def measure(shape: str, found: dict[str, Case], rounds: int, flush: Tensor, bandwidth: float) -> list[Result]:
    graphs, wrong = {}, set()
    for name, case in found.items():
        for _ in range(3):  # compiles, checks packed tensors
            y = case.call()
        scale = case.truth.abs().mean()
        if not torch.isfinite(y).all() or ((y.float() - case.truth).abs() > 0.02 * (case.truth.abs() + scale)).any():
            wrong.add(name)
            continue
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            case.call()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name in random.sample(list(graphs), len(graphs)):
            flush.zero_()
            times[name].append(elapsed(graphs[name].replay))
    medians = {name: statistics.median(values) for name, values in times.items()}
    results = []
    for name, case in found.items():
        if name in wrong:
            results.append(Result(shape, name, None))
            continue
        rivals = ["mlp cublas"] if name.startswith("mlp") else DENSE
        base = min((medians[rival] for rival in rivals if rival in medians), default=None)
        share = case.bytes / (medians[name] * 1e-6) / bandwidth
        results.append(Result(shape, name, medians[name], base and base / medians[name], share))
    return results


def elapsed(call: Callable[[], object]) -> float:
    """Microseconds between two events around a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of the best of 20 copies of 1 GiB."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = min(elapsed(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.nbytes / (best * 1e-6)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="out x in, comma separated")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
