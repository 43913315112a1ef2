"""Perplexity of every method on every pattern, five calibration seeds: docs/quality.md, in a resumable run.

    python benchmarks/quality.py --shared ../shared                       # run what is missing
    python benchmarks/quality.py --models stories260k --patterns 0.5 2:4 --methods sparsegpt gossamer
    python benchmarks/quality.py --methods gossamer --reconstruct         # our method with local reconstruction
    python benchmarks/quality.py --methods gossamer --redo                # run again what is there
    python benchmarks/quality.py --render                                 # only write docs/quality.md
    python benchmarks/quality.py nm --help                                # N:M by training: quality_nm.py
    python benchmarks/quality.py pst --help                               # PST: quality_pst.py
    python benchmarks/quality.py recovery --help                          # after one-shot pruning: quality_recovery.py
    python benchmarks/quality.py soups --help                             # IMP and soups: quality_soups.py

One cell is one model, method, pattern and seed: a full `compress` and an `eval` of what it wrote, as on the command
line. Each finished cell is one JSON line in the results file; a rerun skips the cells it finds there. Why our method
loses a cell is written by hand into `quality_reasons.json` beside the results ("model pattern": "reason").
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quality_table import OURS, cell_key, reason_key, render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
PAGE = ROOT / "docs" / "quality.md"
METHODS = ["magnitude", "wanda", "ria", "sparsegpt", OURS]
# first word -> module here; its `main` takes the rest
SUITES = {"nm": "quality_nm", "pst": "quality_pst", "recovery": "quality_recovery", "soups": "quality_soups"}
SEEDS = [0, 1, 2, 3, 4]
NSAMPLES, SEQLEN = 128, 256
WITHOUT_TEXT = {"magnitude"}  # the same result for every calibration seed: run once


@dataclass(frozen=True)
class Protocol:
    """Where a model is calibrated and evaluated, below the folder of models and texts."""

    calibration: str
    evaluation: str
    windows: int
    patterns: tuple[str, ...]


PROTOCOLS = {
    "stories260k": Protocol(
        "data/tinystories/calibration.txt", "data/tinystories/evaluation.txt", 400, ("0.3", "0.5", "0.6", "0.7", "2:4")
    ),
    "tiny-llama": Protocol(
        "data/gsm8k/train.txt", "data/gsm8k/test.txt", 200, ("0.3", "0.5", "0.6", "0.7", "2:4", "4:8")
    ),
}


@dataclass(frozen=True)
class Job:
    """One cell to run."""

    model: str
    method: str
    pattern: str
    seed: int
    reconstruct: bool

    @property
    def key(self) -> tuple[Any, ...]:
        return cell_key(vars(self))


def jobs(
    models: Sequence[str], methods: Sequence[str], patterns: Sequence[str], seeds: Sequence[int], reconstruct: bool
) -> list[Job]:
    """The cells asked for, seed by seed: an interrupted run has whole rows. No patterns: the protocol's."""
    found = []
    for model in models:
        chosen = [p for p in (patterns or PROTOCOLS[model].patterns) if p in PROTOCOLS[model].patterns]
        for seed, pattern, method in itertools.product(seeds, chosen, methods):
            if method not in WITHOUT_TEXT or seed == seeds[0]:
                found.append(Job(model, method, pattern, seed, reconstruct))
    return found


def run_cell(job: Job, shared: Path, device: str) -> dict[str, Any]:
    """Compress, then evaluate what was written; the line of the results file. The dense model is evaluated once."""
    from gossamer import __version__
    from gossamer.compress.recipe import Machine, PruneStage, Recipe
    from gossamer.compress.run import compress

    protocol = PROTOCOLS[job.model]
    unstructured = ":" not in job.pattern
    model = shared / "models" / job.model
    prune = PruneStage(
        method=job.method,
        sparsity=float(job.pattern) if unstructured else None,
        pattern=None if unstructured else job.pattern,
        scope=None,
        reconstruct=job.reconstruct,
        calibration=str(shared / protocol.calibration),
        nsamples=NSAMPLES,
        seqlen=SEQLEN,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gossamer-quality-") as folder:
        out = Path(folder) / "out"
        report = compress(
            str(model), out, Recipe(stages=(prune,), seed=job.seed), Machine(dtype="float32", device=device)
        )
        seconds = time.monotonic() - started
        after = perplexity(out, shared / protocol.evaluation, protocol.windows, device)
    before = dense_perplexity(model, shared / protocol.evaluation, protocol.windows, device)
    errors = [layer["error_after"] for layer in report["layers"] if layer["error_after"] is not None]
    return {
        **vars(job),
        "before": before["perplexity"],
        "after": after["perplexity"],
        "layer_error": sum(errors) / len(errors) if errors else None,
        "sparsity": report["sparsity"]["prunable"],
        "calibration": protocol.calibration,
        "evaluation": protocol.evaluation,
        "windows": after["protocol"]["windows"],
        "seconds": round(seconds, 2),
        "version": __version__,
    }


def perplexity(model: Path, text: Path, windows: int, device: str) -> dict[str, Any]:
    """What `gossamer eval` measures."""
    from gossamer.compress.recipe import EvaluateStage, Machine
    from gossamer.compress.score import evaluate_model

    stage = EvaluateStage(data=str(text), seqlen=SEQLEN, windows=windows)
    return evaluate_model(model, stage, Machine(dtype="float32", device=device))


dense_perplexity = cache(perplexity)


def read_results(path: Path) -> list[dict[str, Any]]:
    """All lines; a line cut off by an interruption is left out."""
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append_result(path: Path, cell: dict[str, Any]) -> None:
    """One line, after a line break where the last run was cut off inside a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if broken else "") + json.dumps(cell) + "\n")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in SUITES:
        importlib.import_module(SUITES[sys.argv[1]]).main(sys.argv[2:])
        return
    options = _options()
    if options.render:
        _render(options)
    else:
        _run(options)


def _render(options: argparse.Namespace) -> None:
    reasons_file = options.results.with_name("quality_reasons.json")
    reasons = json.loads(reasons_file.read_text(encoding="utf-8")) if reasons_file.exists() else {}
    cells = read_results(options.results)
    known = {reason_key(cell["model"], cell["pattern"], cell["reconstruct"]) for cell in cells}
    for key in sorted(reasons.keys() - known):
        print(f"{reasons_file.name}: no row is called {key!r}")
    options.page.write_text(render(cells, reasons), encoding="utf-8")
    print(f"wrote {options.page}")


def _run(options: argparse.Namespace) -> None:
    done = set() if options.redo else {cell_key(cell) for cell in read_results(options.results)}
    asked = jobs(options.models, options.methods, options.patterns, options.seeds, options.reconstruct)
    todo = [job for job in asked if job.key not in done]
    print(f"{len(todo)} of {len(asked)} cells to run")
    for number, job in enumerate(todo, 1):
        cell = run_cell(job, options.shared.resolve(), options.device)
        append_result(options.results, cell)
        suffix = " + reconstruct" if job.reconstruct else ""
        print(
            f"[{number}/{len(todo)}] {job.model} {job.pattern} {job.method}{suffix} seed {job.seed}: "
            f"{cell['before']:.3f} -> {cell['after']:.3f} in {cell['seconds']:.1f} s",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--patterns", nargs="+", default=[], help="of the model's protocol; default: all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--reconstruct", action="store_true", help="with local reconstruction after pruning")
    parser.add_argument("--redo", action="store_true", help="run cells again that are there; the later line counts")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
