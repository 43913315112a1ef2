"""Pruning with retraining: one-shot, IMP and sparse model soups: docs/quality-soups.md, in a resumable run.

    python benchmarks/quality.py soups --search --models stories260k  # trials, on a quarter of the tokens
    python benchmarks/quality.py soups --models stories260k --seeds 0 1 2
    python benchmarks/quality.py soups --render                         # only write docs/quality-soups.md

Tokens are those of one candidate over all phases. Every searched row has the same trials, judged by the loss on the
training text's held-out split; the evaluation text is read by final cells alone. A trial or cell is one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_table import Spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality_soups.jsonl"
PAGE = ROOT / "docs" / "quality-soups.md"

TEXTS = {  # training, evaluation, evaluation windows, tokens
    "stories260k": ("data/tinystories/calibration.txt", "data/tinystories/evaluation.txt", 400, 500_000),
    "tiny-llama": ("data/gsm8k/train.txt", "data/gsm8k/test.txt", 200, 200_000),
}
SPARSITIES = ["0.7", "0.9"]
SEARCHED_AT = "0.9"
PHASES, SEQLEN, BATCH = 3, 256, 4

DENSE, ONE_SHOT, IMP, LONGER = "dense, trained further", "one-shot", "imp", "imp, 3 times the tokens"
RETRAIN = "one-shot + retrain"
SOUPS = {f"soup m={m} {kind}": (m, kind) for m in (3, 5) for kind in ("uniform", "greedy")}
ROWS = [DENSE, ONE_SHOT, RETRAIN, IMP, LONGER, *SOUPS]
DERIVED = ("best", "ensemble")  # measured in the cells of soups, of the candidates of their last phase

RATES = (1e-3, 3e-3, 1e-2)
FACTORS = ("seed", "learning-rate")
DECAYS = (0.0, 0.1)

Line = Mapping[str, Any]


def trials(row: str) -> list[dict[str, Any]]:
    """Options to try for a row, as many for every row that trains."""
    if row == ONE_SHOT:
        return [{}]
    name, values = ("factor", FACTORS) if row in SOUPS else ("weight_decay", DECAYS)
    return [{"learning_rate": rate, name: value} for rate, value in itertools.product(RATES, values)]


def key(line: Line) -> tuple[Any, ...]:
    """What identifies a line; the last one with a key counts."""
    return (
        line["kind"], line["model"], line["row"], line["sparsity"], line["seed"], line["tokens"],
        json.dumps(line["options"], sort_keys=True),
    )  # fmt: skip


def best_options(lines: Sequence[Line], model: str, row: str) -> dict[str, Any]:
    """Those of the row's trial with the lowest held-out loss; those of the first trial where none was run."""
    found = [
        line
        for line in lines
        if (line["kind"], line["model"], line["row"]) == ("trial", model, row) and math.isfinite(line["heldout"])
    ]
    return dict(min(found, key=lambda line: line["heldout"])["options"]) if found else trials(row)[0]


def wanted(options: argparse.Namespace, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines asked for, without their results, seed by seed."""
    found = []
    for seed, model, sparsity, row in itertools.product(
        [0] if options.search else options.seeds,
        options.models,
        [SEARCHED_AT] if options.search else options.sparsities,
        options.rows,
    ):
        tokens = options.tokens or TEXTS[model][3]
        line = {"model": model, "row": row, "sparsity": None if row == DENSE else sparsity, "seed": seed}
        if options.search and row != ONE_SHOT:
            found += [line | {"kind": "trial", "tokens": tokens // 4, "options": tried} for tried in trials(row)]
        elif not options.search:
            found.append(line | {"kind": "cell", "tokens": tokens, "options": best_options(lines, model, row)})
    return list({key(line): line for line in found}.values())


def stages(line: Line, shared: Path) -> list[Any]:
    """The recipe of a line; a trial does not look at the evaluation text."""
    from gossamer.compress.recipe import EvaluateStage, FinetuneStage, ImpStage, PruneStage, SoupStage

    training, evaluation, windows, _ = TEXTS[line["model"]]
    row, final = line["row"], line["kind"] == "cell"
    common: dict[str, Any] = {"data": str(shared / training), "seqlen": SEQLEN, "batch": BATCH, **line["options"]}
    common["tokens"] = line["tokens"] * (3 if row == LONGER else 1)
    if row == DENSE:
        found: list[Any] = [FinetuneStage(method="full", **common)]
    elif row == ONE_SHOT:
        found = [PruneStage(method="magnitude", sparsity=float(line["sparsity"]), scope="model")]
    elif row in SOUPS:
        count, kind = SOUPS[row]
        measure = str(shared / evaluation) if final else None
        found = [
            SoupStage(
                sparsity=float(line["sparsity"]),
                phases=PHASES,
                candidates=count,
                soup=kind,
                measure=measure,
                measure_windows=windows,
                **common,
            )
        ]
    else:
        phases = 1 if row == RETRAIN else PHASES
        found = [ImpStage(sparsity=float(line["sparsity"]), phases=phases, **common)]
    if final:
        found.append(EvaluateStage(data=str(shared / evaluation), seqlen=SEQLEN, windows=windows))
    return found


def run_line(line: dict[str, Any], shared: Path, device: str) -> dict[str, Any]:
    """One compression with training; the line of the results file."""
    from gossamer import __version__
    from gossamer.compress.recipe import Machine, Recipe
    from gossamer.compress.run import compress

    started = time.monotonic()
    recipe = Recipe(stages=stages(line, shared), seed=line["seed"])
    with tempfile.TemporaryDirectory(prefix="gossamer-quality-") as folder:
        model, out = str(shared / "models" / line["model"]), Path(folder) / "out"
        report = compress(model, out, recipe, Machine(dtype="float32", device=device))
    first = report["stages"][0]
    result: dict[str, Any] = {
        "heldout": first["phases"][-1]["heldout"] if "phases" in first else first.get("heldout", {}).get("after"),
        "sparsity_found": report["sparsity"]["prunable"],
        "seconds": round(time.monotonic() - started, 2),
        "version": __version__,
    }
    if line["kind"] == "cell":
        result |= {name: report["evaluation"][name]["perplexity"] for name in ("before", "after")}
    if line["row"] in SOUPS:
        result["weights"] = first["phases"][-1]["weights"]
        if line["kind"] == "cell":
            measured = first["phases"][-1]["measured"]
            result |= {name: math.exp(measured[name]) for name in (*DERIVED, "uniform")}
    return line | result


def final_cells(lines: Sequence[Line], model: str) -> dict[tuple[str, str | None], dict[int, float]]:
    """(row, sparsity) -> seed -> perplexity, of "best of ROW" and "ensemble of ROW" too; the last line counts."""
    found: dict[tuple[str, str | None], dict[int, float]] = {}
    for line in lines:
        if line["kind"] == "cell" and line["model"] == model:
            found.setdefault((line["row"], line["sparsity"]), {})[line["seed"]] = line["after"]
            for name in DERIVED:
                if name in line:
                    found.setdefault((f"{name} of {line['row']}", line["sparsity"]), {})[line["seed"]] = line[name]
    return found


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """ours - theirs over the seeds that both have, and whether it is below 0 by more than two standard errors."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return "not measured"
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}, one seed: decides nothing"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    holds = "holds" if mean < 0 and -mean > 2 * error else "fails"
    return f"{mean:+.3f}, standard error {error:.3f}, {len(differences)} seeds: the claim {holds}"


def render(lines: Sequence[Line]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for model in TEXTS:
        cells = final_cells(lines, model)
        if not cells:
            continue
        dense = next(line["before"] for line in lines if line["kind"] == "cell" and line["model"] == model)
        parts += [f"## {model}\n", "| | " + " | ".join(SPARSITIES) + " |", "|---|" + "---|" * len(SPARSITIES)]
        parts.append("| dense | " + " | ".join([f"{dense:.3f}"] * len(SPARSITIES)) + " |")
        rows = [row for base in ROWS for row in (base, *(f"{name} of {base}" for name in DERIVED if base in SOUPS))]
        for row in rows:
            texts = [_spread(cells.get((row, None if row == DENSE else sparsity))) for sparsity in SPARSITIES]
            parts.append(f"| {row} | " + " | ".join(texts) + " |")
        parts.append("\nA soup against IMP with the tokens of one candidate, and against its own best candidate:\n")
        for sparsity, row in itertools.product(SPARSITIES, SOUPS):
            soup = cells.get((row, sparsity), {})
            rivals = {"imp": cells.get((IMP, sparsity), {}), "best": cells.get((f"best of {row}", sparsity), {})}
            parts += [f"- {sparsity}, {row} - {name}: {paired(soup, other)}" for name, other in rivals.items() if soup]
        parts.append("\nOptions, by held-out loss:\n")
        parts += [f"- {row}: {_said(best_options(lines, model, row))}" for row in ROWS if row != ONE_SHOT]
        parts.append("")
    return "\n".join(parts)


_INTRODUCTION = f"""# Quality of pruning with retraining

Perplexity on windows of {SEQLEN} tokens, made by `python benchmarks/quality.py soups --render`. Global magnitude,
{PHASES} phases, float32. Mean over seeds, the smallest and the largest in brackets. Every row that trains had
{len(RATES) * 2} trials at {SEARCHED_AT} on a quarter of the tokens, judged by the held-out split of the training text.
"Best of" and "ensemble of" are the best candidate of the last phase by held-out loss, and the mean of its candidates'
predictions. Tokens are those of one candidate: a soup of m candidates trains on m times as many.
"""


def _spread(values: Mapping[int, float] | None) -> str:
    if not values:
        return "-"
    spread = Spread.of(list(values.values()))
    return f"{spread.mean:.3f}" if spread.count == 1 else f"{spread.mean:.3f} ({spread.low:.3f} to {spread.high:.3f})"


def _said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def main(words: Sequence[str]) -> None:
    from quality import append_result, read_results

    options = _options(words)
    lines = read_results(options.results)
    if options.render:
        options.page.write_text(render(lines), encoding="utf-8")
        print(f"wrote {options.page}")
        return
    done = set() if options.redo else {key(line) for line in lines}
    asked = wanted(options, lines)
    todo = [line for line in asked if key(line) not in done]
    print(f"{len(todo)} of {len(asked)} to run")
    for number, line in enumerate(todo, 1):
        result = run_line(line, options.shared.resolve(), options.device)
        append_result(options.results, result)
        figure = f"perplexity {result['after']:.3f}" if "after" in result else f"held-out loss {result['heldout']:.4f}"
        what = f"{line['model']} {line['row']} {line['sparsity'] or ''} seed {line['seed']} {_said(line['options'])}"
        print(f"[{number}/{len(todo)}] {what}: {figure} in {result['seconds']:.1f} s", flush=True)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quality.py soups", description=__doc__.split("\n")[0])
    parser.add_argument("--search", action="store_true", help="trials instead of final cells")
    parser.add_argument("--models", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--sparsities", nargs="+", choices=SPARSITIES, default=SPARSITIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, help="of one candidate over all phases; default: the model's")
    parser.add_argument("--redo", action="store_true", help="run again what is there; the later line counts")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)
