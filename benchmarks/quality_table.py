"""From finished cells to the tables of docs/quality.md. Pure: lists of dictionaries in, text out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from published import PUBLISHED, Published

OURS = "gossamer"
BASELINE = "sparsegpt"
RIVAL = "alps"
KEY = ("model", "method", "pattern", "seed", "reconstruct")

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of some perplexities."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Verdict:
    """Ours against the baseline, paired over the seeds that both have, and against the rival's published mean."""

    ours: Spread
    baseline: Spread | None
    difference: Spread | None
    seeds_won: int
    rival: float | None

    @property
    def loses(self) -> bool:
        """True when any seed is not below the baseline, or the mean is not below the rival's."""
        behind = self.difference is not None and self.seeds_won < self.difference.count
        return behind or (self.rival is not None and self.ours.mean >= self.rival)

    @property
    def lost_to(self) -> str:
        names = []
        if self.difference is not None and self.seeds_won < self.difference.count:
            names.append(f"SparseGPT in {self.difference.count - self.seeds_won} of {self.difference.count} seeds")
        if self.rival is not None and self.ours.mean >= self.rival:
            names.append("ALPS")
        return " and ".join(names)


def cell_key(cell: Cell) -> tuple[Any, ...]:
    """What identifies a cell; the last line with a key counts."""
    return tuple(cell[name] for name in KEY)


def latest(cells: Iterable[Cell]) -> list[Cell]:
    """One cell per key, the last one written, in order of first appearance."""
    found: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        found[cell_key(cell)] = cell
    return list(found.values())


def perplexities(cells: Iterable[Cell], model: str, method: str, pattern: str, reconstruct: bool) -> dict[int, float]:
    """seed -> perplexity after pruning."""
    return {
        cell["seed"]: cell["after"]
        for cell in cells
        if (cell["model"], cell["method"], cell["pattern"], cell["reconstruct"])
        == (model, method, pattern, reconstruct)
    }


def verdict(cells: Sequence[Cell], model: str, pattern: str, reconstruct: bool) -> Verdict | None:
    """The comparison of one row; None where ours was not run. The baseline is never reconstructed."""
    ours = perplexities(cells, model, OURS, pattern, reconstruct)
    if not ours:
        return None
    baseline = perplexities(cells, model, BASELINE, pattern, False)
    paired = [ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())]
    rival = PUBLISHED.get(model, {}).get(pattern, {}).get(RIVAL)
    return Verdict(
        Spread.of(list(ours.values())),
        Spread.of(list(baseline.values())) if baseline else None,
        Spread.of(paired) if paired else None,
        sum(difference < 0 for difference in paired),
        None if rival is None else rival.mean,
    )


def render(cells: Iterable[Cell], reasons: Mapping[str, str]) -> str:
    """The whole page. `reasons`: "model pattern [reconstruct]" -> why our method loses there."""
    cells = latest(cells)
    parts = [_INTRODUCTION]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = [cell for cell in cells if cell["model"] == model]
        parts += [f"## {model}\n", _protocol_line(own), _methods_table(own, model, reasons)]
        for reconstruct in (False, True):
            parts.append(_comparison_table(own, model, reconstruct))
        parts.append(_reproduction_table(own, model))
    return "\n".join(part for part in parts if part) + "\n"


_INTRODUCTION = """# Quality

Perplexity after one-shot pruning, made by `python benchmarks/quality.py --render` from its own results file. Each
figure is the mean over calibration seeds, with the smallest and the largest in brackets. Calibration: 128 windows of
256 tokens; evaluation: non-overlapping windows of 256 tokens; float32; every linear map of the decoder blocks is
pruned. Magnitude pruning sees no text, so it has one figure. **Bold**: our method does not win there, and the reason
stands below the table.
"""


_ROUNDING = """Here every count is exact. The authors' row-wise code rounds each row's count down: on 64 inputs 19 zeros
instead of 19.2 at 30 %, 44 instead of 44.8 at 70 %, so its figures there are for a denser model. At 50 % and 2:4 the
counts agree, the calibration windows are other ones; on the same statistics, our Wanda and SparseGPT choose the masks
of an independent reference (tests/pruning).
"""


def _protocol_line(cells: Sequence[Cell]) -> str:
    first = cells[0]
    versions = ", ".join(sorted({str(cell.get("version", "unknown")) for cell in cells}))
    return (
        f"Evaluation text `{first['evaluation']}`, {first['windows']} windows; "
        f"calibration text `{first['calibration']}`. "
        f"Dense model: {first['before']:.4f}. Gossamer {versions}.\n"
    )


def _methods_table(cells: Sequence[Cell], model: str, reasons: Mapping[str, str]) -> str:
    methods = sorted({cell["method"] for cell in cells}, key=lambda name: (name == OURS, name))
    columns = [(method, False) for method in methods]
    columns += [(method, True) for method in methods if any(c["method"] == method and c["reconstruct"] for c in cells)]
    lines = [["zeros", *(name + (" + reconstruct" if again else "") for name, again in columns)]]
    lost: list[str] = []
    for pattern in _patterns(cells):
        row = [pattern_name(pattern)]
        for method, again in columns:
            values = perplexities(cells, model, method, pattern, again)
            text = _spread(Spread.of(list(values.values()))) if values else "-"
            outcome = verdict(cells, model, pattern, again) if method == OURS else None
            if outcome is not None and outcome.loses:
                text = f"**{text}**"
                lost.append(_lost_line(model, pattern, again, outcome, reasons))
            row.append(text)
        lines.append(row)
    return _table(lines) + "".join(lost) + ("\n" if lost else "")


def _lost_line(model: str, pattern: str, reconstruct: bool, outcome: Verdict, reasons: Mapping[str, str]) -> str:
    key = reason_key(model, pattern, reconstruct)
    suffix = " with reconstruction" if reconstruct else ""
    reason = reasons.get(key, "not explained yet")
    return f"- {pattern_name(pattern)}{suffix}: loses to {outcome.lost_to}. Reason: {reason}\n"


def reason_key(model: str, pattern: str, reconstruct: bool) -> str:
    """The key of a row in the file of reasons."""
    return f"{model} {pattern}" + (" reconstruct" if reconstruct else "")


def _comparison_table(cells: Sequence[Cell], model: str, reconstruct: bool) -> str:
    header = ["zeros", "ours - SparseGPT, paired", "seeds won", "ours / SparseGPT", "ALPS (published)"]
    header += ["ours / ALPS", "ours / dense"]
    lines = [header]
    for pattern in _patterns(cells):
        outcome = verdict(cells, model, pattern, reconstruct)
        if outcome is None:
            continue
        dense = next(cell["before"] for cell in cells)
        won = "-" if outcome.difference is None else f"{outcome.seeds_won} of {outcome.difference.count}"
        lines.append(
            [
                pattern_name(pattern),
                "-" if outcome.difference is None else _spread(outcome.difference, signed=True),
                won,
                "-" if outcome.baseline is None else f"{outcome.ours.mean / outcome.baseline.mean:.3f}",
                "-" if outcome.rival is None else f"{outcome.rival:.2f}",
                "-" if outcome.rival is None else f"{outcome.ours.mean / outcome.rival:.3f}",
                f"{outcome.ours.mean / dense:.3f}",
            ]
        )
    if len(lines) == 1:
        return ""
    title = "Our method with reconstruction" if reconstruct else "Our method"
    return f"### {title} against SparseGPT and ALPS\n\n" + _table(lines)


def _reproduction_table(cells: Sequence[Cell], model: str) -> str:
    lines = [["zeros", "method", "here", "authors' code", "within or below"]]
    for pattern in _patterns(cells):
        for method, published in PUBLISHED.get(model, {}).get(pattern, {}).items():
            values = perplexities(cells, model, method, pattern, False)
            if values:
                mine = Spread.of(list(values.values()))
                lines.append(
                    [pattern_name(pattern), method, _spread(mine), _published(published), _judge(mine, published)]
                )
    if len(lines) == 1:
        return ""
    return f"### The rivals' code under the same protocol\n\n{_table(lines)}\n{_ROUNDING}"


def _judge(mine: Spread, published: Published) -> str:
    if published.high is None:
        return "yes" if mine.mean <= published.mean else f"+{mine.mean - published.mean:.2f} over one seed"
    return "yes" if mine.mean <= published.high else "no"


def pattern_name(pattern: str) -> str:
    """0.5 as 50 %, the rest as it is."""
    try:
        return f"{100 * float(pattern):g} %"
    except ValueError:
        return pattern


def _patterns(cells: Iterable[Cell]) -> list[str]:
    """Sparsities in ascending order, then the other patterns."""
    return sorted({cell["pattern"] for cell in cells}, key=lambda text: (":" in text, text))


def _spread(values: Spread, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if values.count == 1:
        return f"{values.mean:{sign}.2f}"
    return f"{values.mean:{sign}.2f} ({values.low:{sign}.2f} to {values.high:{sign}.2f})"


def _published(value: Published) -> str:
    return f"{value.mean:.2f}" if value.low is None else f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    rows.insert(1, "|" + "---|" * len(lines[0]))
    return "\n".join(rows) + "\n"
