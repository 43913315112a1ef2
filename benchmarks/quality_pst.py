"""PST against masked fine-tuning with as many trained numbers and tokens: docs/quality-pst.md, in a resumable run.

    python benchmarks/quality.py pst --search                 # learning rates of every row, on a quarter of the tokens
    python benchmarks/quality.py pst                          # final cells, each with the rate its row found
    python benchmarks/quality.py pst --models stories260k --rows pst "wanda + masklora" --seeds 0 1 2
    python benchmarks/quality.py pst --render                 # only write docs/quality-pst.md

PST trains factors of rank 2 for the weights, of rank 2 for the score, and a number for each row and column: five
for every input and output of a matrix. MaskLoRA of rank 5 trains as many, and both train biases and norms. The rows
with `full` train all kept weights. Every row has as many trials at every sparsity, judged by the loss on the training
text's held-out split; final cells alone read the evaluation text. A trial or cell is one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import HELDOUT, TEXTS, TRIALS, Line, best_trial, by_sparsity, compressed, next_best, paired, run, spread

SPARSITIES = ["0.5", "0.7", "0.9"]
SEQLEN, BATCH = 256, 4
RANK = 2
EQUAL_RANK = 2 * RANK + 1  # of low-rank updates with as many numbers: PST's scores have rows and columns besides

DENSE, PST = "dense, trained further", "pst"
MASKED = {
    f"{scored} + {method}": (scored, method) for method in ("masklora", "full") for scored in ("magnitude", "wanda")
}
EQUAL = [row for row, (_, method) in MASKED.items() if method == "masklora"]
ROWS = [DENSE, PST, *MASKED]
RATES = {"full": (3e-4, 1e-3, 3e-3), "masklora": (1e-3, 3e-3, 1e-2), PST: (1e-3, 3e-3, 1e-2), DENSE: (1e-4, 3e-4, 1e-3)}


def rates(row: str) -> tuple[float, ...]:
    """To try for a row."""
    return RATES[MASKED[row][1] if row in MASKED else row]


def key(line: Line) -> tuple[Any, ...]:
    """What identifies a line; the last one with a key counts."""
    return tuple(line[name] for name in ("kind", "model", "row", "sparsity", "seed", "tokens", "rate"))


def best_rate(lines: Sequence[Line], model: str, row: str, sparsity: str | None) -> float | None:
    """The rate of the trial with the lowest held-out loss; None where none was run."""
    best = best_trial(lines, model=model, row=row, sparsity=sparsity)
    return None if best is None else best["rate"]


def wanted(options: argparse.Namespace, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines asked for, without their results, seed by seed."""
    found = []
    seeds = [0] if options.search else options.seeds
    for seed, model, sparsity, row in itertools.product(seeds, options.models, options.sparsities, options.rows):
        at = None if row == DENSE else sparsity
        tokens = options.tokens or TEXTS[model][3]
        line = {"model": model, "row": row, "sparsity": at, "seed": seed}
        if options.search:
            found += [line | {"kind": "trial", "tokens": tokens // 4, "rate": rate} for rate in rates(row)]
        else:
            rate = best_rate(lines, model, row, at) or rates(row)[1]
            found.append(line | {"kind": "cell", "tokens": tokens, "rate": rate})
    return list({key(line): line for line in found}.values())


def stages(line: Line, shared: Path) -> list[Any]:
    """The recipe of a line; a trial does not look at the evaluation text."""
    from gossamer.compress.recipe import EvaluateStage, FinetuneStage, PruneStage

    training, evaluation, windows, _ = TEXTS[line["model"]]
    text, row = str(shared / training), line["row"]
    common: dict[str, Any] = {
        "data": text, "seqlen": SEQLEN, "batch": BATCH, "tokens": line["tokens"], "learning_rate": line["rate"],
        "heldout": HELDOUT[line["model"]],
    }  # fmt: skip
    found: list[Any] = []
    if row == DENSE:
        found.append(FinetuneStage(method="full", **common))
    elif row == PST:
        sparsity = float(line["sparsity"])
        found.append(FinetuneStage(method="pst", sparsity=sparsity, rank=RANK, score_rank=RANK, **common))
    else:
        scored, method = MASKED[row]
        calibration = {} if scored == "magnitude" else {"calibration": text, "nsamples": 128, "seqlen": SEQLEN}
        found.append(PruneStage(method=scored, sparsity=float(line["sparsity"]), scope="matrix", **calibration))
        rank = {"rank": EQUAL_RANK} if method == "masklora" else {}
        found.append(FinetuneStage(method=method, **rank, **common))
    if line["kind"] == "cell":
        found.append(EvaluateStage(data=str(shared / evaluation), seqlen=SEQLEN, windows=windows))
    return found


def run_line(line: dict[str, Any], shared: Path, device: str) -> dict[str, Any]:
    """One compression with training; the line of the results file."""
    report, _, result = compressed(line, stages(line, shared), shared / "models" / line["model"], device)
    trained = next(stage for stage in report["stages"] if stage["stage"] == "finetune")
    result |= {
        "heldout": trained["heldout"]["after"],
        "trained": trained["trained"],
        "zeros": report["sparsity"]["zeros"],
        "training_s": trained["seconds"],
        "peak": report["peak_memory_bytes"],
    }
    return line | result


def final_cells(lines: Sequence[Line], model: str) -> dict[tuple[str, str | None], dict[int, Line]]:
    """(row, sparsity) -> seed -> line, the last one. Cells of rates that further trials have replaced do not count."""
    found: dict[tuple[str, str | None], dict[int, Line]] = {}
    for line in lines:
        if line["kind"] != "cell" or line["model"] != model:
            continue
        if best_rate(lines, model, line["row"], line["sparsity"]) in (None, line["rate"]):
            found.setdefault((line["row"], line["sparsity"]), {})[line["seed"]] = line
    return found


def render(lines: Sequence[Line]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for model in TEXTS:
        cells = final_cells(lines, model)
        if not cells:
            continue
        dense = next(line["before"] for line in lines if line["kind"] == "cell" and line["model"] == model)
        tokens = _counts(one for of in cells.values() for one in of.values())
        tried = _counts(line for line in lines if line["kind"] == "trial" and line["model"] == model)
        parts += [f"## {model}\n", f"Untouched: {dense:.3f}. {tokens} tokens; rates by trials of {tried} tokens.\n"]
        header = ["", "trained", *(f"{100 * float(s):g} %" for s in SPARSITIES), "rates"]
        parts += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for row in ROWS:
            own = [cells.get((row, None if row == DENSE else sparsity), {}) for sparsity in SPARSITIES]
            if any(own):
                trained = next(f"{line['trained']:,}" for of in own for line in of.values())
                texts = [spread({seed: line["after"] for seed, line in of.items()}) for of in own]
                used = [f"{next(iter(of.values()))['rate']:g}" if of else "-" for of in own]
                parts.append(f"| {' | '.join([row, trained, *texts, ', '.join(used)])} |")
        parts.append("\nPST against the best of the others with as many trained numbers:\n")
        parts += [f"- {sparsity}: {verdict(cells, sparsity)}" for sparsity in SPARSITIES if (PST, sparsity) in cells]
        parts.append("")
    return "\n".join(parts)


def _counts(lines: Iterable[Line]) -> str:
    """Numbers of tokens, in words."""
    return " or ".join(f"{count:,}" for count in sorted({line["tokens"] for line in lines})) or "no"


def verdict(cells: Mapping[tuple[str, str | None], Mapping[int, Line]], sparsity: str) -> str:
    """PST minus the next best row of equal size."""

    def figures(row: str) -> dict[int, float]:
        return {seed: line["after"] for seed, line in cells.get((row, sparsity), {}).items()}

    ours, rivals = figures(PST), {row: figures(row) for row in EQUAL}
    best = next_best(ours, rivals)
    if best is None:  # one seed
        name = min((row for row in EQUAL if rivals[row]), key=lambda row: sum(rivals[row].values()), default=EQUAL[0])
        return f"pst - {name}: {paired(ours, rivals[name])}"
    return f"pst - {best[0]}: {paired(ours, best[1])}"


_INTRODUCTION = f"""# PST against masked fine-tuning

Perplexity on windows of {SEQLEN} tokens, made by `python benchmarks/quality.py pst --render`. PST prunes every
matrix to the sparsity while it trains (factors of rank {RANK} and {RANK}, rows and columns of the score). Others are
pruned first, by magnitude or Wanda inside every matrix, and train under the masks: MaskLoRA of rank {EQUAL_RANK} has as
many numbers as PST, `full` trains all kept weights. Mean over seeds, the smallest and the largest in brackets. Every
row had 3 learning rates at every sparsity, {TRIALS}.
"""


def main(words: Sequence[str]) -> None:
    run(_options(words), key=key, wanted=wanted, run_line=run_line, render=render, told=_told)


def _told(line: Line) -> str:
    return f"{line['model']} {line['row']} {line['sparsity'] or ''} seed {line['seed']} rate {line['rate']:g}"


def _options(words: Sequence[str]) -> argparse.Namespace:
    return by_sparsity("pst", __doc__, ROWS, SPARSITIES).parse_args(words)
