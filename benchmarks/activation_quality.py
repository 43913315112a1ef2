"""Perplexity of activation policies at realised sparsities: the tables of docs/activation-sparsity.md, resumable.

    python benchmarks/activation_quality.py --shared ../shared                       # run what is missing
    python benchmarks/activation_quality.py --models stories260k --methods auto threshold --targets 0.5
    python benchmarks/activation_quality.py --weights 0.5 2:4 --methods auto --targets 0 0.4 0.5   # over pruned weights
    python benchmarks/activation_quality.py --render                                 # only write the tables

One cell is one model, weights (dense, 0.5 or 2:4, pruned by our own method), method and target. The protocol is one for
all: the first quarter of every evaluation window is the dense prompt, only the rest is scored, every scored position is
sparse. Each finished cell is one JSON line; a rerun skips what is there. coreinfer's targets are shares of its neurons
kept (20, 40, 60 %), as in its paper; the sparsity beside them is over all linear maps, as everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages import put
from quality import append_result, read_results
from suite import next_best, paired

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "activation_quality.jsonl"
PAGE = ROOT / "docs" / "activation-sparsity.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
TARGETS = [0.25, 0.4, 0.5, 0.6, 0.7]
KEPT = {0.2: 0.2, 0.4: 0.4, 0.6: 0.6}
LENGTH, MEMORY = 256, 2 << 30
MODELS = {
    "stories260k": ("data/tinystories/calibration.txt", "data/tinystories/evaluation.txt"),
    "tiny-llama": ("data/gsm8k/train.txt", "data/gsm8k/test.txt"),
    "tiny-opt": ("data/tinystories/calibration.txt", "data/tinystories/evaluation.txt"),
}
OURS = "auto"


def makers(seed: int) -> dict[str, Callable[[float], Any]]:
    """Method of the table -> what makes it for a target."""
    from gossamer.activation_sparsity.auto import Auto
    from gossamer.activation_sparsity.cats import Cats
    from gossamer.activation_sparsity.coreinfer import CoreInfer
    from gossamer.activation_sparsity.rsparse import RSparse
    from gossamer.activation_sparsity.threshold import Threshold
    from gossamer.activation_sparsity.wina import Wina

    return {
        "threshold": lambda _: Threshold(step=0.1),
        "cats": lambda _: Cats(),
        "wina": lambda _: Wina(step=0.1),
        "rsparse-uniform": lambda _: RSparse(search=False, seed=seed),
        "rsparse": lambda _: RSparse(seed=seed),
        "sparse-only": lambda _: RSparse(search=False, rho=1.0, seed=seed),
        "low-rank-only": lambda _: RSparse(search=False, rho=0.0, seed=seed),
        "coreinfer": lambda kept: CoreInfer(keep=kept, seed=seed),
        OURS: lambda _: Auto(),
    }


class Bench:
    """One model (dense or pruned) with its windows, embedded once."""

    def __init__(self, name: str, weights: str, options: argparse.Namespace, folder: Path) -> None:
        import torch

        from gossamer.compress.activation.walk import Walk
        from gossamer.compress.blocks import StreamedModel
        from gossamer.compress.data import calibration_tokens, evaluation_windows, load_text, token_ids
        from gossamer.compress.source import open_source
        from gossamer.compress.text import load_tokenizer

        calibration, evaluation = (str(options.shared.resolve() / path) for path in MODELS[name])
        dense = options.shared.resolve() / "models" / name
        tokenizer = load_tokenizer(dense)
        text = load_text(calibration, "calibration")
        self.windows = calibration_tokens(tokenizer, text, options.nsamples, LENGTH, options.seed)
        ids = token_ids(tokenizer, load_text(evaluation, "evaluation"))
        held = evaluation_windows(ids, LENGTH, options.windows)
        model = dense if weights == "dense" else _pruned(dense, weights, calibration, folder)
        source = open_source(str(model))
        self.model = StreamedModel.open(source, source.folder, dtype=torch.float32)
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.held = Walk(self.model, held, memory_bytes=MEMORY, scratch=folder, resident=True)
        self.walk = Walk(self.model, self.windows, memory_bytes=MEMORY, scratch=self.scratch, resident=True)
        self.walk.share_blocks(self.held)
        self.before = self.held.run(None)

    def cell(self, method: Any, target: float) -> dict[str, Any]:
        """Calibrate, then measure on held-out text."""
        from gossamer.compress.activation.calibrate import Calibration
        from gossamer.compress.activation.walk import increase

        started = time.monotonic()
        run = Calibration(self.model, self.windows, method, memory_bytes=MEMORY, scratch=self.scratch, walk=self.walk)
        policy = run.run(target)
        seconds = time.monotonic() - started
        found = self.held.run(policy)
        rise, error = increase(found.losses, self.before.losses)
        return {
            "before": self.before.score.perplexity,
            "after": found.score.perplexity,
            "increase": rise,
            "standard_error": error,
            "realised": found.reads.sparsity,
            "windows": len(self.held.windows),
            "nsamples": len(self.windows),
            "seconds": round(seconds, 1),
        }


def _pruned(model: Path, pattern: str, calibration: str, folder: Path) -> Path:
    from gossamer.compress.recipe import Machine, PruneStage, Recipe
    from gossamer.compress.run import compress

    given: dict[str, Any] = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    stage = PruneStage(calibration=calibration, nsamples=128, seqlen=LENGTH, **given)
    compress(str(model), folder / "pruned", Recipe(stages=(stage,)), Machine(dtype="float32", device="cpu"))
    return folder / "pruned"


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two lines the same cell. A target out of reach is so on any number of windows."""
    size = ("windows", "nsamples") if "unreachable" not in cell else ()
    return tuple(cell.get(name) for name in ("model", "weights", "method", "target", "seed", *size))


def _both(named: dict[str, Any], size: dict[str, int], pair: tuple[str, float]) -> list[dict[str, Any]]:
    """A cell as it stands in the results when measured, and when it was out of reach."""
    cell = {**named, "method": pair[0], "target": pair[1]}
    return [cell | size, cell | {"unreachable": ""}]


def wanted(options: argparse.Namespace, model: str) -> list[tuple[str, float]]:
    """(method, target), the columns of the table one after the other."""
    pairs = []
    for target, method in itertools.product(options.targets, options.methods):
        if method != "coreinfer" and not (method == "cats" and model == "tiny-opt"):
            pairs.append((method, target))
    if "coreinfer" in options.methods:
        pairs += [("coreinfer", kept) for kept in KEPT]
    return pairs


def run(options: argparse.Namespace) -> None:
    """Run what the results file lacks."""
    from gossamer.errors import RecipeError

    for model, weights in itertools.product(options.models, options.weights):
        done = {key(cell) for cell in read_results(options.results)}
        named = {"model": model, "weights": weights, "seed": options.seed}
        size = {"windows": options.windows, "nsamples": options.nsamples}
        todo = [p for p in wanted(options, model) if {key(c) for c in _both(named, size, p)}.isdisjoint(done)]
        if not todo:
            continue
        with tempfile.TemporaryDirectory(prefix="gossamer-activation-") as folder:
            bench = Bench(model, weights, options, Path(folder))
            for method, target in todo:
                named |= {"method": method, "target": target}
                goal = 0.1 if method == "coreinfer" else target
                try:
                    cell = named | bench.cell(makers(options.seed)[method](target), goal)
                except RecipeError as error:
                    cell = named | {"unreachable": error.message}
                append_result(options.results, cell)
                print(
                    " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in cell.items()),
                    flush=True,
                )


def tables(cells: list[dict[str, Any]]) -> str:
    """Markdown: one table per model over dense weights, one of combinations."""
    latest = {key(cell): cell for cell in cells}
    parts = []
    for model in MODELS:
        seeds = [c for c in latest.values() if c["model"] == model and c["weights"] == "dense" and "after" in c]
        own = [c for c in seeds if c["seed"] == 0]
        if not own:
            continue
        targets = sorted({c["target"] for c in own if c["method"] != "coreinfer"})
        parts.append(
            f"**{model}**, dense {own[0]['before']:.3f}; perplexity (realised sparsity in percent); "
            f"{own[0]['windows']} evaluation and {own[0]['nsamples']} calibration windows, seed {own[0]['seed']}\n\n"
            f"| method | {' | '.join(f'{t:.0%}' for t in targets)} |\n|---|{'---|' * len(targets)}\n"
        )
        for method in [name for name in makers(0) if name != "coreinfer"]:
            row = {c["target"]: c for c in own if c["method"] == method}
            if row:
                parts[-1] += f"| {method} | {' | '.join(_text(row.get(t)) for t in targets)} |\n"
        core = sorted((c["target"], c) for c in own if c["method"] == "coreinfer")
        if core:
            told = "; ".join(f"{kept:.0%} of neurons {_text(cell)}" for kept, cell in core)
            parts[-1] += f"\ncoreinfer: {told}\n"
        parts[-1] += _against_the_next(seeds)
    parts.append(_combinations(list(latest.values())))
    return "\n".join(part for part in parts if part)


def _against_the_next(cells: list[dict[str, Any]]) -> str:
    """Per target, ours less the best rival that has as many seeds: differences of perplexity over calibration seeds."""
    lines = []
    for target in sorted({c["target"] for c in cells if c["method"] == OURS}):
        found: dict[str, dict[int, float]] = {}
        for cell in cells:
            if cell["target"] == target and cell["method"] != "coreinfer":
                found.setdefault(cell["method"], {})[cell["seed"]] = cell["after"]
        ours = found.pop(OURS)
        best = next_best(ours, found)
        if best is not None:
            lines.append(f"- {target:.0%}: {OURS} - {best[0]}: {paired(ours, best[1])}")
    return "\nOver calibration seeds:\n\n" + "\n".join(lines) + "\n" if lines else ""


def _combinations(cells: list[dict[str, Any]]) -> str:
    other = any(c["weights"] != "dense" for c in cells)
    own = [c for c in cells if c["method"] == OURS and "after" in c and c["seed"] == 0 and other]
    lines = []
    for model in MODELS:
        rows = [c for c in own if c["model"] == model]
        for weights in ("dense", "0.5", "2:4"):
            row = {c["target"]: c for c in rows if c["weights"] == weights}
            if row and any(c["weights"] != "dense" for c in rows):
                before = next(iter(row.values()))["before"]
                lines.append(f"| {model} | {weights} | {before:.3f} | {_text(row.get(0.4))} | {_text(row.get(0.5))} |")
    if not lines:
        return ""
    head = (
        "Weights and activations together (`auto`)\n\n| model | weights | 0 % | 40 % | 50 % |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(lines) + "\n"


def _text(cell: dict[str, Any] | None) -> str:
    if cell is None or "after" not in cell:
        return "-"
    value = cell["after"]
    return (
        f"{value:.3f} ({100 * cell['realised']:.1f})" if value < 1000 else f"{value:.0f} ({100 * cell['realised']:.1f})"
    )


def render(options: argparse.Namespace) -> None:
    """Write the tables between their marks."""
    put(options.page, BEGIN, END, tables(read_results(options.results)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--weights", nargs="+", choices=["dense", "0.5", "2:4"], default=["dense"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=200, help="evaluation windows")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    options.methods = options.methods or list(makers(options.seed))
    if options.render:
        render(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
