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
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_table import Spread

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality_nm.jsonl"
PAGE = ROOT / "docs" / "quality-nm.md"

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

Line = Mapping[str, Any]


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
    found = [
        line for line in lines if line["kind"] == "trial" and line["row"] == row and math.isfinite(line["heldout"])
    ]
    return dict(min(found, key=lambda line: line["heldout"])["options"]) if found else trials(row)[0]


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
    from gossamer import __version__
    from gossamer.compress.recipe import Machine, Recipe
    from gossamer.compress.run import compress

    started = time.monotonic()
    recipe = Recipe(stages=stages(line, shared), seed=line["seed"])
    with tempfile.TemporaryDirectory(prefix="gossamer-quality-") as folder:
        out = Path(folder) / "out"
        report = compress(str(shared / "models" / MODEL), out, recipe, Machine(dtype="float32", device=device))
        log = [json.loads(text) for text in (out / "gossamer" / "metrics.jsonl").read_text().splitlines()]
    trained = next(stage for stage in report["stages"] if "heldout" in stage)
    flips = [entry["flips"] for entry in log if "flips" in entry]
    result = {
        "heldout": trained["heldout"]["after"],
        "sparsity": report["sparsity"]["prunable"],
        "flips": statistics.fmean(flips) if flips else None,
        "seconds": round(time.monotonic() - started, 2),
        "version": __version__,
    }
    if line["kind"] == "cell":
        evaluation = report["evaluation"]
        result |= {name: evaluation[name]["perplexity"] for name in ("before", "after")}
    return line | result


def final_cells(lines: Sequence[Line]) -> dict[tuple[str, str | None], dict[int, float]]:
    """(row, pattern) -> seed -> perplexity; of several lines the last one counts."""
    found: dict[tuple[str, str | None], dict[int, float]] = {}
    for line in lines:
        if line["kind"] == "cell":
            found.setdefault((line["row"], line["pattern"]), {})[line["seed"]] = line["after"]
    return found


def verdict(cells: Mapping[tuple[str, str | None], Mapping[int, float]], pattern: str) -> str:
    """The claim at one pattern: the best progressive row against SR-STE, paired over the seeds that both have."""
    rows = [row for row in PROGRESSIVE if (row, pattern) in cells]
    rival = cells.get((RIVAL, pattern))
    if not rows or not rival:
        return "not measured"
    best = min(rows, key=lambda row: statistics.fmean(cells[row, pattern].values()))
    ours = cells[best, pattern]
    paired = [ours[seed] - rival[seed] for seed in sorted(ours.keys() & rival.keys())]
    if not paired:
        return "no seed in common"
    mean = statistics.fmean(paired)
    if len(paired) < 2:
        return f"{best} - {RIVAL} = {mean:+.3f}, one seed: decides nothing"
    error = statistics.stdev(paired) / len(paired) ** 0.5
    holds = "holds" if mean < 0 and -mean > 2 * error else "fails"
    return f"{best} - {RIVAL} = {mean:+.3f}, standard error {error:.3f}, {len(paired)} seeds: the claim {holds}"


def render(lines: Sequence[Line]) -> str:
    """The whole page."""
    cells = final_cells(lines)
    dense = next((line["before"] for line in lines if line["kind"] == "cell"), math.nan)
    tokens = sorted({line["tokens"] for line in lines if line["kind"] == "cell"})
    table = ["| | " + " | ".join(PATTERNS) + " |", "|---|" + "---|" * len(PATTERNS)]
    for row in ROWS:
        if row == DENSE:
            found = cells.get((row, None))
            texts = [_spread(found)] + ["same"] * (len(PATTERNS) - 1)
        else:
            texts = [_spread(cells.get((row, pattern))) for pattern in PATTERNS]
        table.append(f"| {row} | " + " | ".join(texts) + " |")
    chosen = [f"- {row}: {_said(best_options(lines, row))}" for row in ROWS if any(row == x[0] for x in cells)]
    claims = [f"- {pattern}: {verdict(cells, pattern)}" for pattern in PATTERNS]
    return "\n".join(
        [
            _INTRODUCTION,
            f"Dense model, untouched: {dense:.4f}. Tokens per cell: {', '.join(f'{count:,}' for count in tokens)}.\n",
            *table,
            "\nThe best progressive row against SR-STE; lower is better:\n",
            *claims,
            "\nOptions, by held-out loss:\n",
            *chosen,
            "",
        ]
    )


_INTRODUCTION = f"""# Quality of N:M patterns reached by training

Perplexity of {MODEL} on {WINDOWS} windows of {SEQLEN} tokens of `{EVALUATION}` after training on `{TRAINING}`, made by
`python benchmarks/quality.py nm --render`. MLP and attention have the pattern; float32. Mean over seeds, the smallest
and the largest in brackets. Each row had {len(RATES) * 2} trials at {SEARCHED_AT} on a quarter of the tokens, judged by
the loss on the held-out split of the training text.
"""


def _spread(values: Mapping[int, float] | None) -> str:
    if not values:
        return "-"
    spread = Spread.of(list(values.values()))
    return f"{spread.mean:.2f}" if spread.count == 1 else f"{spread.mean:.2f} ({spread.low:.2f} to {spread.high:.2f})"


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
        figure = f"perplexity {result['after']:.3f}, " if "after" in result else ""
        loss, seconds = result["heldout"], result["seconds"]
        what = f"{line['row']} {line['pattern'] or ''} seed {line['seed']} {_said(line['options'])}"
        print(
            f"[{number}/{len(todo)}] {what}: {figure}held-out loss {loss:.4f} in {seconds:.1f} s",
            flush=True,
        )


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quality.py nm", description=__doc__.split("\n")[0])
    parser.add_argument("--search", action="store_true", help="trials instead of final cells")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--trial-tokens", type=int, default=TRIAL_TOKENS)
    parser.add_argument("--redo", action="store_true", help="run again what is there; the later line counts")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with models/ and data/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)
