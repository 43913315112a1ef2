"""Pruning with retraining: one-shot, IMP and sparse model soups: docs/quality-soups.md, in a resumable run.

    python benchmarks/quality.py soups --search --models stories260k  # trials, on a quarter of the tokens
    python benchmarks/quality.py soups --models stories260k --seeds 0 1 2
    python benchmarks/quality.py soups --render                         # only write docs/quality-soups.md

Tokens are those of one candidate over all phases. Every row that trains has as many trials at every sparsity, judged by
the loss on the training text's held-out split; soups share those of one. Final cells alone read the evaluation text. A
trial or cell is one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite import HELDOUT, TEXTS, TRIALS, Line, best_trial, by_sparsity, compressed, paired, run, said, spread

SPARSITIES = ["0.7", "0.9"]
PHASES, SEQLEN, BATCH = 3, 256, 4

DENSE, ONE_SHOT, IMP, LONGER = "dense, trained further", "one-shot", "imp", "imp, 3 times the tokens"
RETRAIN = "one-shot + retrain"
SOUPS = {f"soup m={m} {kind}": (m, kind) for m in (3, 5) for kind in ("uniform", "greedy")}
ROWS = [DENSE, ONE_SHOT, RETRAIN, IMP, LONGER, *SOUPS]
DERIVED = ("best", "ensemble")  # measured in the cells of soups, of the candidates of their last phase
SEARCHED_SOUP = "soup m=3 uniform"  # every soup takes the options of its trials: as many as a row of one model has

RATES: dict[str, dict[str | None, tuple[float, ...]]] = {  # by sparsity; None: of the dense model
    "stories260k": dict.fromkeys([None, *SPARSITIES], (1e-3, 3e-3, 1e-2, 2e-2, 4e-2)),
    "tiny-llama": dict.fromkeys([None, "0.7"], (1e-4, 3e-4, 1e-3, 3e-3)) | {"0.9": (3e-4, 1e-3, 3e-3, 1e-2)},
}
FACTORS = ("seed", "learning-rate")
DECAYS = (0.0, 0.1)


def trials(model: str, row: str, sparsity: str | None) -> list[dict[str, Any]]:
    """Options to try for a row, as many for every row of a model that trains."""
    if row == ONE_SHOT:
        return [{}]
    name, values = ("factor", FACTORS) if row in SOUPS else ("weight_decay", DECAYS)
    return [{"learning_rate": rate, name: value} for rate, value in itertools.product(RATES[model][sparsity], values)]


def searched(row: str) -> str:
    """The row whose trials decide the options of `row`."""
    return SEARCHED_SOUP if row in SOUPS else row


def key(line: Line) -> tuple[Any, ...]:
    """What identifies a line; the last one with a key counts."""
    return (
        line["kind"], line["model"], line["row"], line["sparsity"], line["seed"], line["tokens"],
        json.dumps(line["options"], sort_keys=True),
    )  # fmt: skip


def at(row: str, sparsity: str) -> str | None:
    """The sparsity in the lines of a row."""
    return None if row == DENSE else sparsity


def best(lines: Sequence[Line], model: str, row: str, sparsity: str | None) -> dict[str, Any] | None:
    """The options of the trial with the lowest held-out loss; None where none was run."""
    found = best_trial(lines, model=model, row=searched(row), sparsity=sparsity)
    return None if found is None else dict(found["options"])


def best_options(lines: Sequence[Line], model: str, row: str, sparsity: str | None) -> dict[str, Any]:
    """The best ones; those of the first trial where none was run."""
    return best(lines, model, row, sparsity) or trials(model, row, sparsity)[0]


def wanted(options: argparse.Namespace, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines asked for, without their results, seed by seed."""
    found = []
    for seed, model, sparsity, row in itertools.product(
        [0] if options.search else options.seeds,
        options.models,
        options.sparsities,
        dict.fromkeys(map(searched, options.rows)) if options.search else options.rows,
    ):
        tokens = options.tokens or TEXTS[model][3]
        line = {"model": model, "row": row, "sparsity": at(row, sparsity), "seed": seed}
        if options.search and row != ONE_SHOT:
            found += [
                line | {"kind": "trial", "tokens": tokens // 4, "options": tried}
                for tried in trials(model, row, line["sparsity"])
            ]
        elif not options.search:
            found.append(
                line | {"kind": "cell", "tokens": tokens, "options": best_options(lines, model, row, line["sparsity"])}
            )
    return list({key(line): line for line in found}.values())


def stages(line: Line, shared: Path) -> list[Any]:
    """The recipe of a line; a trial does not look at the evaluation text."""
    from gossamer.compress.recipe import EvaluateStage, FinetuneStage, ImpStage, PruneStage, SoupStage

    training, evaluation, windows, _ = TEXTS[line["model"]]
    row, final = line["row"], line["kind"] == "cell"
    common: dict[str, Any] = {"data": str(shared / training), "seqlen": SEQLEN, "batch": BATCH, **line["options"]}
    common["heldout"] = HELDOUT[line["model"]]
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
    model = shared / "models" / line["model"]
    report, _, result = compressed(line, stages(line, shared), model, device)
    first = report["stages"][0]
    trained = first["phases"][-1] if "phases" in first else first
    result |= {"heldout": trained.get("heldout"), "sparsity_found": report["sparsity"]["prunable"]}
    if isinstance(result["heldout"], dict):
        result["heldout"] = result["heldout"]["after"]
    if line["row"] in SOUPS:
        result["weights"] = first["phases"][-1]["weights"]
        if line["kind"] == "cell":
            measured = first["phases"][-1]["measured"]
            result |= {name: math.exp(measured[name]) for name in (*DERIVED, "uniform")}
    return line | result


def final_cells(lines: Sequence[Line], model: str) -> dict[tuple[str, str | None], dict[int, float]]:
    """(row, sparsity) -> seed -> perplexity, of "best of ROW" and "ensemble of ROW" too; the last line counts.

    Cells with options that further trials have replaced do not count.
    """
    found: dict[tuple[str, str | None], dict[int, float]] = {}
    for line in lines:
        if line["kind"] != "cell" or line["model"] != model:
            continue
        if best(lines, model, line["row"], line["sparsity"]) in (None, line["options"]):
            found.setdefault((line["row"], line["sparsity"]), {})[line["seed"]] = line["after"]
            for name in DERIVED:
                if name in line:
                    found.setdefault((f"{name} of {line['row']}", line["sparsity"]), {})[line["seed"]] = line[name]
    return found


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
            own = [cells.get((row, at(row, sparsity))) for sparsity in SPARSITIES]
            if any(own):
                parts.append(f"| {row} | " + " | ".join(map(spread, own)) + " |")
        parts.append("\nA soup against IMP with the tokens of one candidate, and against its own best candidate:\n")
        for sparsity, row in itertools.product(SPARSITIES, SOUPS):
            soup = cells.get((row, sparsity), {})
            rivals = {"imp": cells.get((IMP, sparsity), {}), "best": cells.get((f"best of {row}", sparsity), {})}
            parts += [f"- {sparsity}, {row} - {name}: {paired(soup, other)}" for name, other in rivals.items() if soup]
        count = len(trials(model, IMP, SPARSITIES[0]))
        parts.append(f"\nOptions, the best of at least {count} trials by held-out loss:\n")
        parts += [f"- {row}: {_chosen(lines, model, row)}" for row in (DENSE, RETRAIN, IMP, LONGER, SEARCHED_SOUP)]
        parts.append("")
    return "\n".join(parts)


_INTRODUCTION = f"""# Quality of pruning with retraining

Perplexity on windows of {SEQLEN} tokens, made by `python benchmarks/quality.py soups --render`. Global magnitude,
{PHASES} phases, float32. Mean over seeds, the smallest and the largest in brackets. Every row that trains had as many
trials at every sparsity, on a quarter of the tokens, {TRIALS};
soups share those of "{SEARCHED_SOUP}".
"Best of" and "ensemble of" are the best candidate of the last phase by held-out loss, and the mean of its candidates'
predictions. Tokens are those of one candidate: a soup of m candidates trains on m times as many.
"""


def _chosen(lines: Sequence[Line], model: str, row: str) -> str:
    """The options of a row, by sparsity; "edge" where no rate beyond the best was tried on one side."""
    told: dict[str, list[str]] = {}
    for sparsity in SPARSITIES:
        options = best(lines, model, row, at(row, sparsity))
        of = {"kind": "trial", "model": model, "row": searched(row), "sparsity": at(row, sparsity)}
        tried = [line["options"]["learning_rate"] for line in lines if of.items() <= line.items()]
        edge = options is not None and options["learning_rate"] in (min(tried), max(tried))
        words = "not searched" if options is None else said(options) + (" (edge)" if edge else "")
        told.setdefault(words, []).append(sparsity)
    if len(told) == 1:
        return next(iter(told))
    return "; ".join(f"at {sparsities[0]} {words}" for words, sparsities in told.items())


def main(words: Sequence[str]) -> None:
    run(_options(words), key=key, wanted=wanted, run_line=run_line, render=render, told=_told)


def _told(line: Line) -> str:
    return f"{line['model']} {line['row']} {line['sparsity'] or ''} seed {line['seed']} {said(line['options'])}"


def _options(words: Sequence[str]) -> argparse.Namespace:
    return by_sparsity("soups", __doc__, ROWS, SPARSITIES).parse_args(words)
