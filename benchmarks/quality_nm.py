"""N:M patterns reached by training, on tiny-llama: docs/quality-nm.md, in a resumable run.

    python benchmarks/quality.py nm --search          # trials of every row at 1:8, on a quarter of the tokens
    python benchmarks/quality.py nm                   # final cells, each with the best options its row found
    python benchmarks/quality.py nm --seeds 0 1 2 --rows mdgf-exp sr-ste --patterns 1:8 1:16
    python benchmarks/quality.py nm --render          # only write docs/quality-nm.md

Every row gets the same tokens, the same number of trials and the same text. Trials are judged by the loss on the
training text's held-out split; the evaluation text is read by final cells alone. A trial or cell is one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite import TRIALS, Line, best_trial, compressed, paired, parser, run, said, spread

MODEL, TRAINING, EVALUATION = "tiny-llama", "data/gsm8k/train.txt", "data/gsm8k/test.txt"
PATTERNS = ["1:4", "2:8", "1:8", "1:16"]
SEARCHED_AT = "1:8"
TOKENS, TRIAL_TOKENS = 200_000, 50_000
SEQLEN, BATCH, WINDOWS = 256, 4, 200

DENSE = "dense, trained further"
ONE_SHOT = "one-shot + masked retrain"
PROGRESSIVE = ["mdgf-exp", "mdgf-linear", "sdgf-stepwise", "sdgf-geometric"]
RIVAL = "sr-ste"
ROWS = [DENSE, ONE_SHOT, *PROGRESSIVE, RIVAL, "ste"]

RATES = (3e-4, 1e-3, 3e-3)
KNOBS: dict[str, tuple[str, tuple[Any, Any]]] = {  # the second thing that a row's trials vary: as many for each
    DENSE: ("weight_decay", (0.0, 0.1)),
    ONE_SHOT: ("weight_decay", (0.0, 0.1)),
    "mdgf-exp": ("decay", (3.0, 10.0)),
    "mdgf-linear": ("decay", (1.0, 2.0)),
    "sdgf-stepwise": ("gradient", ("product", "straight")),
    "sdgf-geometric": ("gradient", ("product", "straight")),
    "sr-ste": ("shrink", (0.1, 10.0)),
    "ste": ("weight_decay", (0.0, 0.1)),
}


def trials(row: str) -> list[dict[str, Any]]:
    """Options to try for a row, as many for every one."""
    name, values = KNOBS[row]
    return [{"learning_rate": rate, name: value} for rate, value in itertools.product(RATES, values)]


def pattern_of(row: str, pattern: str) -> str | None:
    """The dense row has none: it is run once."""
    return None if row == DENSE else pattern


def key(line: Line) -> tuple[Any, ...]:
    """What identifies a line; the last one with a key counts."""
    return (
        line["kind"], line["row"], line["pattern"], line["seed"], line["tokens"],
        json.dumps(line["options"], sort_keys=True),
    )  # fmt: skip


def best_options(lines: Sequence[Line], row: str) -> dict[str, Any]:
    """Those of the row's trial with the lowest held-out loss; those of the first trial where none was run."""
    best = best_trial(lines, row=row)
    return trials(row)[0] if best is None else dict(best["options"])


def wanted(options: argparse.Namespace, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines asked for, without their results, seed by seed."""
    if options.search:
        return [
            {
                "kind": "trial", "row": row, "pattern": pattern_of(row, SEARCHED_AT), "seed": 0,
                "tokens": options.trial_tokens, "options": tried,
            }
            for row in options.rows
            for tried in trials(row)
        ]  # fmt: skip
    found = [
        {
            "kind": "cell", "row": row, "pattern": pattern_of(row, pattern), "seed": seed,
            "tokens": options.tokens, "options": best_options(lines, row),
        }
        for seed, pattern, row in itertools.product(options.seeds, options.patterns, options.rows)
    ]  # fmt: skip
    return list({key(line): line for line in found}.values())


def stages(line: Line, shared: Path) -> list[Any]:
    """The recipe of a line; a trial does not look at the evaluation text."""
    from gossamer.compress.recipe import EvaluateStage, FinetuneStage, NmFlowStage, PruneStage

    text = str(shared / TRAINING)
    common = {"data": text, "seqlen": SEQLEN, "tokens": line["tokens"], "batch": BATCH, **line["options"]}
    if line["row"] in (DENSE, ONE_SHOT):
        found: list[Any] = [FinetuneStage(method="full", **common)]
        if line["row"] == ONE_SHOT:
            found.insert(0, PruneStage(pattern=line["pattern"], calibration=text, nsamples=128, seqlen=SEQLEN))
    else:
        found = [NmFlowStage(flow=line["row"], pattern=line["pattern"], **common)]
    if line["kind"] == "cell":
        found.append(EvaluateStage(data=str(shared / EVALUATION), seqlen=SEQLEN, windows=WINDOWS))
    return found


def run_line(line: dict[str, Any], shared: Path, device: str) -> dict[str, Any]:
    """One compression with training; the line of the results file."""
    report, log, result = compressed(line, stages(line, shared), shared / "models" / MODEL, device, _metrics)
    trained = next(stage for stage in report["stages"] if "heldout" in stage)
    flips = [entry["flips"] for entry in log if "flips" in entry]
    return line | {
        "heldout": trained["heldout"]["after"],
        "sparsity": report["sparsity"]["prunable"],
        "flips": statistics.fmean(flips) if flips else None,
        **result,
    }


def _metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (out / "gossamer" / "metrics.jsonl").read_text().splitlines()]


def final_cells(lines: Sequence[Line], value: str = "after") -> dict[tuple[str, str | None], dict[int, float]]:
    """(row, pattern) -> seed -> perplexity, or another `value`; of several lines the last one counts."""
    found: dict[tuple[str, str | None], dict[int, float]] = {}
    for line in lines:
        if line["kind"] == "cell":
            found.setdefault((line["row"], line["pattern"]), {})[line["seed"]] = line[value]
    return found


def verdict(lines: Sequence[Line], pattern: str) -> str:
    """The claim at one pattern: the progressive row with the lowest held-out loss against SR-STE, paired over seeds.

    The evaluation text has no say in which row that is: the best of four by luck would look like a gain.
    """
    cells, losses = final_cells(lines), final_cells(lines, "heldout")
    rows = [row for row in PROGRESSIVE if (row, pattern) in cells]
    if not rows or (RIVAL, pattern) not in cells:
        return "not measured"
    best = min(rows, key=lambda row: statistics.fmean(losses[row, pattern].values()))
    return f"{best} - {RIVAL} = {paired(cells[best, pattern], cells[RIVAL, pattern])}"


def render(lines: Sequence[Line]) -> str:
    """The whole page."""
    cells = final_cells(lines)
    dense = next((line["before"] for line in lines if line["kind"] == "cell"), math.nan)
    tokens = sorted({line["tokens"] for line in lines if line["kind"] == "cell"})
    table = ["| | " + " | ".join(PATTERNS) + " |", "|---|" + "---|" * len(PATTERNS)]
    for row in ROWS:
        if row == DENSE:
            found = cells.get((row, None))
            texts = [spread(found, 2)] + ["same"] * (len(PATTERNS) - 1)
        else:
            texts = [spread(cells.get((row, pattern)), 2) for pattern in PATTERNS]
        table.append(f"| {row} | " + " | ".join(texts) + " |")
    chosen = [f"- {row}: {said(best_options(lines, row))}" for row in ROWS if any(row == x[0] for x in cells)]
    claims = [f"- {pattern}: {verdict(lines, pattern)}" for pattern in PATTERNS]
    return "\n".join(
        [
            _INTRODUCTION,
            f"Dense model, untouched: {dense:.4f}. Tokens per cell: {', '.join(f'{count:,}' for count in tokens)}.\n",
            *table,
            "\nThe progressive row with the lowest held-out loss against SR-STE; lower is better:\n",
            *claims,
            "\nOptions, by held-out loss:\n",
            *chosen,
            "",
        ]
    )


_INTRODUCTION = f"""# Quality of N:M patterns reached by training

Perplexity of {MODEL} on {WINDOWS} windows of {SEQLEN} tokens of `{EVALUATION}` after training on `{TRAINING}`, made by
`python benchmarks/quality.py nm --render`. MLP and attention have the pattern; float32. Mean over seeds, the smallest
and the largest in brackets. Each row had {len(RATES) * 2} trials at {SEARCHED_AT} on a quarter of the tokens, {TRIALS}.
"""


def main(words: Sequence[str]) -> None:
    run(_options(words), key=key, wanted=wanted, run_line=run_line, render=render, told=_told)


def _told(line: Line) -> str:
    return f"{line['row']} {line['pattern'] or ''} seed {line['seed']} {said(line['options'])}"


def _options(words: Sequence[str]) -> argparse.Namespace:
    made = parser("nm", __doc__, ROWS)
    made.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    made.add_argument("--tokens", type=int, default=TOKENS)
    made.add_argument("--trial-tokens", type=int, default=TRIAL_TOKENS)
    return made.parse_args(words)
