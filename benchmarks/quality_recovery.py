"""Recovery after one-shot pruning by fine-tuning under the masks: docs/quality-recovery.md, in a resumable run.

    python benchmarks/quality.py recovery --search            # learning rates of every row, on a quarter of the tokens
    python benchmarks/quality.py recovery                     # final cells, each with the rate its row found
    python benchmarks/quality.py recovery --models stories260k --rows masklora full --seeds 0 1 2
    python benchmarks/quality.py recovery --render            # only write docs/quality-recovery.md

Every row gets the same tokens, the same number of trials and the same text. Trials are judged by the loss on the
training text's held-out split; the evaluation text is read by final cells alone. A trial or cell is one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import TRIALS, Line, best_trial, compressed, parser, run, spread


@dataclass(frozen=True)
class Setting:
    """One model: how it is pruned, trained and evaluated."""

    sparsity: float
    training: str
    evaluation: str
    windows: int
    tokens: int


SETTINGS = {
    "stories260k": Setting(
        0.6, "data/tinystories/calibration.txt", "data/tinystories/evaluation.txt", 400, tokens=500_000
    ),
    "tiny-llama": Setting(0.8, "data/gsm8k/train.txt", "data/gsm8k/test.txt", 200, tokens=200_000),
}
SEQLEN, BATCH = 256, 4

DENSE = "dense, trained further"
PRUNED = "one-shot"
RECOVERY = ["masklora", "bias-norm", "full"]
ROWS = [DENSE, PRUNED, *RECOVERY]
RATES = {
    DENSE: (1e-4, 3e-4, 1e-3),
    "masklora": (1e-3, 3e-3, 1e-2),
    "bias-norm": (1e-3, 3e-3, 1e-2),
    "full": (3e-4, 1e-3, 3e-3),
}


def key(line: Line) -> tuple[Any, ...]:
    """What identifies a line; the last one with a key counts."""
    return tuple(line[name] for name in ("kind", "model", "row", "seed", "tokens", "rate"))


def best_rate(lines: Sequence[Line], model: str, row: str) -> float | None:
    """The rate of the row's trial with the lowest held-out loss; the middle one where none was run."""
    if row not in RATES:
        return None
    best = best_trial(lines, model=model, row=row)
    return RATES[row][1] if best is None else best["rate"]


def wanted(options: argparse.Namespace, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines asked for, without their results, seed by seed."""
    if options.search:
        return [
            {
                "kind": "trial",
                "model": model,
                "row": row,
                "seed": 0,
                "tokens": _tokens(options, model) // 4,
                "rate": rate,
            }
            for model, row in itertools.product(options.models, options.rows)
            for rate in RATES.get(row, ())
        ]
    return [
        {
            "kind": "cell", "model": model, "row": row, "seed": seed,
            "tokens": 0 if row == PRUNED else _tokens(options, model), "rate": best_rate(lines, model, row),
        }
        for seed, model, row in itertools.product(options.seeds, options.models, options.rows)
    ]  # fmt: skip


def _tokens(options: argparse.Namespace, model: str) -> int:
    return options.tokens or SETTINGS[model].tokens


def stages(line: Line, shared: Path) -> list[Any]:
    """The recipe of a line; a trial does not look at the evaluation text."""
    from gossamer.compress.recipe import EvaluateStage, FinetuneStage, PruneStage

    setting = SETTINGS[line["model"]]
    text = str(shared / setting.training)
    found: list[Any] = []
    if line["row"] != DENSE:
        found.append(PruneStage(sparsity=setting.sparsity, calibration=text, nsamples=128, seqlen=SEQLEN))
    if line["row"] != PRUNED:
        method = "full" if line["row"] == DENSE else line["row"]
        found.append(
            FinetuneStage(
                method=method, data=text, seqlen=SEQLEN, tokens=line["tokens"], batch=BATCH, learning_rate=line["rate"]
            )
        )
    if line["kind"] == "cell":
        found.append(EvaluateStage(data=str(shared / setting.evaluation), seqlen=SEQLEN, windows=setting.windows))
    return found


def run_line(line: dict[str, Any], shared: Path, device: str) -> dict[str, Any]:
    """One compression; the line of the results file. ValueError when training changed the number of zeros."""
    report, _, result = compressed(line, stages(line, shared), shared / "models" / line["model"], device)
    result |= {
        "sparsity": report["sparsity"]["prunable"],
        "zeros": report["sparsity"]["zeros"],
        "peak": report["peak_memory_bytes"],
    }
    trained = next((stage for stage in report["stages"] if stage["stage"] == "finetune"), None)
    if trained is not None:
        result |= {
            "heldout": trained["heldout"]["after"],
            "trained": trained["trained"],
            "training_s": trained["seconds"],
        }
        pruned = sum(row["zeros"] for row in report["layers"])
        if trained["zeros"] != pruned:
            raise ValueError(f"{line}: {pruned} weights were pruned, {trained['zeros']} are masked after training")
    return line | result


def cells_of(lines: Sequence[Line], model: str) -> dict[str, dict[int, Line]]:
    """row -> seed -> line; of several lines the last one counts."""
    found: dict[str, dict[int, Line]] = {}
    for line in lines:
        if line["kind"] == "cell" and line["model"] == model:
            found.setdefault(line["row"], {})[line["seed"]] = line
    return found


def difference(cells: Mapping[str, Mapping[int, Line]], row: str, other: str) -> str:
    """Paired over the seeds that both have: mean and twice its standard error."""
    seeds = sorted(cells.get(row, {}).keys() & cells.get(other, {}).keys())
    paired = [cells[row][seed]["after"] - cells[other][seed]["after"] for seed in seeds]
    if not paired:
        return "-"
    mean = statistics.fmean(paired)
    return (
        f"{mean:+.3f}" if len(paired) < 2 else f"{mean:+.3f} ± {2 * statistics.stdev(paired) / len(paired) ** 0.5:.3f}"
    )


def render(lines: Sequence[Line]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for model, setting in SETTINGS.items():
        cells = cells_of(lines, model)
        if not cells:
            continue
        first = next(iter(next(iter(cells.values())).values()))
        tokens = sorted({line["tokens"] for row in cells.values() for line in row.values() if line["tokens"]})
        parts.append(
            f"## {model}, {100 * setting.sparsity:g} %\n\nDense model, untouched: {first['before']:.4f}. Tokens: "
            f"{', '.join(f'{count:,}' for count in tokens)} of `{setting.training}`, rows of {SEQLEN}, {BATCH} per "
            f"step. Evaluation: {setting.windows} windows of `{setting.evaluation}`.\n"
        )
        header = [
            "",
            "perplexity",
            "against dense, trained further",
            "zeros",
            "trained",
            "rate",
            "training, s",
            "peak, MB",
        ]
        table = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for row in ROWS:
            if row in cells:
                table.append(f"| {' | '.join([row, *_figures(cells, row)])} |")
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def _figures(cells: Mapping[str, Mapping[int, Line]], row: str) -> list[str]:
    found = list(cells[row].values())
    first = found[0]
    return [
        spread({seed: line["after"] for seed, line in cells[row].items()}, 2),
        "" if row == DENSE else difference(cells, row, DENSE),
        " / ".join(sorted({f"{line['zeros']:,}" for line in found})),
        f"{first['trained']:,}" if "trained" in first else "",
        f"{first['rate']:g}" if first["rate"] else "",
        f"{statistics.fmean(line['training_s'] for line in found):.0f}" if "training_s" in first else "",
        f"{max(line['peak'] for line in found) / 1e6:.0f}",
    ]


_INTRODUCTION = f"""# Recovery after pruning

Perplexity after one-shot pruning by the default method and fine-tuning under its masks, made by
`python benchmarks/quality.py recovery --render`. Mean over seeds, the smallest and the largest in brackets; differences
are paired over seeds, with twice their standard error. Each trained row had {len(RATES[DENSE])} learning rates on a
quarter of the tokens, {TRIALS}. Zeros are counted in the written
files; peak memory is that of the whole process, pruning and evaluation included.
"""


def main(words: Sequence[str]) -> None:
    run(_options(words), key=key, wanted=wanted, run_line=run_line, render=render, told=_told)


def _told(line: Line) -> str:
    return f"{line['model']} {line['row']} seed {line['seed']} rate {line['rate']}"


def _options(words: Sequence[str]) -> argparse.Namespace:
    made = parser("recovery", __doc__, ROWS)
    made.add_argument("--models", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    made.add_argument("--tokens", type=int, help="per run; default: the model's own")
    return made.parse_args(words)
