"""Sparse deltas against LoRA and full fine-tuning on small models, equal tokens, learning rates searched: resumable.

    python benchmarks/finetune_quality.py --shared ../shared              # run what is missing, then write the page
    python benchmarks/finetune_quality.py --tasks stories-shakespeare --ranks 2 --methods spiel-ag lora
    python benchmarks/finetune_quality.py --tasks tiny-wikitext --base-quant nf4 --tokens 200000
    python benchmarks/finetune_quality.py --render                        # only write docs/quality-finetune.md

A cell is one task, method, rank, learning rate, seed, number of tokens and kind of base (float32, or quantised):
`gossamer finetune`, then perplexity of the result on the task's test text and on the text that the model was trained
on before (forgetting). Every learning rate of the grid is run with the first seed, and further ones, about twice as
large or small, as long as the best is the last on its side; the one with the lowest loss on held-out training rows
is run with the other seeds. The test text takes no part in any choice. Each finished cell is one JSON line; a rerun
skips the cells it finds there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune_table import render
from quality import append_result, perplexity, read_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "finetune.jsonl"
SEEDS = [0, 1, 2, 3, 4]
SPARSE = ("spiel-ag", "spiel-ma", "static", "random")
ADAPTERS = (*SPARSE, "lora")
METHODS = ("base", *ADAPTERS, "full")  # of the first and last no rank is asked: theirs is 0
GRIDS = {"spiel-ma": (5e-2, 1e-1, 2e-1), "full": (2e-3, 5e-3, 1e-2), "base": (0.0,)}
GRID = (1e-2, 2e-2, 5e-2)  # of the others
LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 0) for digit in (1, 2, 5))
SEQLEN, BATCH, WINDOWS = 256, 8, 200


@dataclass(frozen=True)
class Task:
    """A model and its texts, below the folder of models and data.

    `weights`: of the matrices that adapters train beside.
    `split`: train on this first share of the text and test on the rest, where there is one file for both.
    """

    model: str
    weights: int
    train: str
    test: str
    before: str
    ranks: tuple[int, ...]
    tokens: int
    split: float = 1.0


TASKS = {
    "stories-shakespeare": Task(
        "stories260k",
        226_560,
        "shakespeare/train.txt",
        "shakespeare/valid.txt",
        "tinystories/evaluation.txt",
        (1, 2),
        1_000_000,
    ),
    "stories-gsm8k": Task(
        "stories260k", 226_560, "gsm8k/train.txt", "gsm8k/test.txt", "tinystories/evaluation.txt", (1, 2), 1_000_000
    ),
    "tiny-wikitext": Task(
        "tiny-llama",
        4_423_680,
        "wikitext2/wiki.test.raw",
        "wikitext2/wiki.test.raw",
        "gsm8k/test.txt",
        (2, 8),
        1_000_000,
        0.8,
    ),
}


@dataclass(frozen=True)
class Job:
    """One cell."""

    task: str
    method: str
    rank: int
    learning_rate: float
    seed: int
    tokens: int
    base_quant: str | None = None


def main() -> None:
    options = _options()
    cells = read_results(options.results)
    if not options.render:
        for job in jobs(options, cells):
            cell = run_cell(job, options.shared.resolve(), options.windows)
            append_result(options.results, cell)
            cells.append(cell)
            print(
                f"{job.task} {job.method} {job.base_quant or 'float32'} rank {job.rank} lr {job.learning_rate:g} "
                f"seed {job.seed}: "
                f"test {cell['test']:.3f}, before {cell['before']:.3f}, {cell['seconds']:.0f} s",
                flush=True,
            )
    made = render(cells, {name: (task.model, task.weights) for name, task in TASKS.items()}, SEQLEN, WINDOWS)
    options.page.write_text(made, encoding="utf-8")
    print(f"wrote {options.page}")


def jobs(options: argparse.Namespace, cells: list[dict[str, Any]]) -> Iterator[Job]:
    """What is missing. Further seeds come when the grid of the first is complete: `cells` grows meanwhile."""
    for name in options.tasks:
        task = TASKS[name]
        tokens = options.tokens or task.tokens
        for rank in (0, *(options.ranks or task.ranks)):
            for method in options.methods:
                if (rank > 0) != (method in ADAPTERS):
                    continue
                quant = options.base_quant if method in ADAPTERS else None
                if options.base_quant and method == "full":
                    continue  # it trains the weights themselves
                grid = options.rates or GRIDS.get(method, GRID)
                first = [Job(name, method, rank, lr, options.seeds[0], tokens, quant) for lr in grid]
                yield from missing(first, cells)
                if method == "base":
                    continue
                while beyond := None if options.rates else next_rate(cells, first[0]):
                    yield replace(first[0], learning_rate=beyond)
                best = best_rate(cells, first[0])
                yield from missing([replace(first[0], learning_rate=best, seed=s) for s in options.seeds[1:]], cells)


def missing(wanted: list[Job], cells: list[dict[str, Any]]) -> Iterator[Job]:
    for job in wanted:
        if not any(_same(cell, asdict(job)) for cell in cells):
            yield job


def best_rate(cells: list[dict[str, Any]], like: Job) -> float:
    """The learning rate with the lowest held-out loss, all else as in `like`."""
    return min(_tried(cells, like), key=lambda cell: cell["heldout"])["learning_rate"]


def next_rate(cells: list[dict[str, Any]], like: Job) -> float | None:
    """A learning rate beyond the best one, where that is the smallest or largest tried; None when it lies inside."""
    best = best_rate(cells, like)
    rates = sorted({cell["learning_rate"] for cell in _tried(cells, like)})
    larger, smaller = ([rate for rate in LADDER if sign * rate > sign * best] for sign in (1, -1))
    if best == rates[-1] and larger:
        return larger[0]
    return smaller[-1] if best == rates[0] and smaller else None


def _tried(cells: list[dict[str, Any]], like: Job) -> list[dict[str, Any]]:
    wanted = {name: value for name, value in asdict(like).items() if name != "learning_rate"}
    return [cell for cell in cells if _same(cell, wanted)]


def _same(cell: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a finished cell is of this kind; lines from before bases could be quantised do not name theirs."""
    return all(cell.get(name) == value for name, value in wanted.items())


def run_cell(job: Job, shared: Path, windows: int) -> dict[str, Any]:
    """Fine-tune and measure; the line of the results file."""
    from gossamer import __version__

    task = TASKS[job.task]
    model, before = shared / "models" / task.model, shared / "data" / task.before
    with tempfile.TemporaryDirectory(prefix="gossamer-finetune-") as folder:
        train, test = _texts(task, shared, Path(folder))
        out, figures = model, {"heldout": None, "seconds": 0.0, "trained": 0, "peak": None, "file": 0}
        if job.method != "base":
            out = Path(folder) / "out"
            figures = _finetune(job, model, train, out)
        return {
            **asdict(job),
            **figures,
            "test": perplexity(out, test, windows, "cpu")["perplexity"],
            "before": perplexity(out, before, windows, "cpu")["perplexity"],
            "version": __version__,
        }


def _finetune(job: Job, model: Path, train: Path, out: Path) -> dict[str, Any]:
    from gossamer.compress.recipe import ExportStage, FinetuneStage, Machine, Recipe
    from gossamer.compress.run import compress

    fields: dict[str, Any] = {"method": job.method}
    if job.method == "random":
        fields = {"method": "static", "selection": "random"}
    if job.method in SPARSE:
        fields["rank_equivalent"] = job.rank
    if job.method == "lora":
        fields |= {"rank": job.rank, "alpha": 2 * job.rank}
    if job.base_quant is not None:
        fields["base_quant"] = job.base_quant
    stage = FinetuneStage(
        data=str(train), seqlen=SEQLEN, batch=BATCH, tokens=job.tokens, learning_rate=job.learning_rate, save_every=0,
        **fields,
    )  # fmt: skip
    started = time.monotonic()
    recipe = Recipe(stages=(stage, ExportStage(format="dense")), seed=job.seed)
    report = compress(str(model), out, recipe, Machine(dtype="float32", device="cpu"))
    found = next(entry for entry in report.data["stages"] if entry["stage"] == "finetune")
    adapter = list((out / "gossamer").glob("adapter-*/adapter_model.safetensors"))
    return {
        "heldout": found["heldout"]["after"],
        "seconds": round(time.monotonic() - started, 2),
        "trained": found["trained"],
        "peak": report.data["peak_memory_bytes"],
        "file": adapter[0].stat().st_size if adapter else sum(f.stat().st_size for f in out.glob("*.safetensors")),
    }


def _texts(task: Task, shared: Path, folder: Path) -> tuple[Path, Path]:
    """The files to train and to test on."""
    train, test = shared / "data" / task.train, shared / "data" / task.test
    if task.split == 1.0:
        return train, test
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(task.split * len(lines))
    parts = folder / "train.txt", folder / "test.txt"
    for path, part in zip(parts, (lines[:cut], lines[cut:]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return parts


def _options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[], help="default: the task's")
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="instead of the method's grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--base-quant", choices=["nf4", "fp4", "int8"], help="adapters train beside a quantised base")
    parser.add_argument("--tokens", type=int, help="to train on; default: the task's")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of the test texts")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality-finetune.md")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
