"""The tables of docs/head-plans.md from the lines of head_plans.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import put
from quality import read_results
from suite import next_best, spread

METHODS = ["uniform", "per-layer", "masformer", "duo", "moa", "gossamer"]
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown of everything measured; the later of two lines of one cell counts."""
    known = {(c["suite"], c["model"], c["density"], c["method"], c.get("seed", 0)): c for c in lines}
    parts: list[str] = []
    for cell in (c for c in known.values() if c["suite"] == "influence"):
        parts += [
            f"Spearman correlation with the measured change, {cell['model']}, {cell['cases']} pairs of head and rule "
            f"at {cell['length']} tokens:",
            "",
            "| predicted by | change of the loss | KL to dense |",
            "|---|---|---|",
            *(f"| {name} | {row['loss']:.3f} | {row['kl']:.3f} |" for name, row in cell["spearman"].items()),
            "",
        ]
    for suite, figure in (("perplexity", "perplexity"), ("retrieval", "accuracy")):
        for model in dict.fromkeys(c["model"] for c in known.values() if c["suite"] == suite):
            parts += _comparison(known, suite, model, figure)
    return "\n".join(parts).rstrip() + "\n"


def _comparison(known: dict[Any, dict[str, Any]], suite: str, model: str, figure: str) -> list[str]:
    own = [c for c in known.values() if (c["suite"], c["model"]) == (suite, model)]
    densities = sorted({c["density"] for c in own})
    rows = [f"{model}, {figure}; dense {own[0]['dense'][figure]:.4g}:", ""]
    rows += [f"| method | {' | '.join(f'{100 * d:g} % of the KV bytes' for d in densities)} |"]
    rows += ["|---" * (len(densities) + 1) + "|"]
    found: dict[tuple[str, float], dict[int, float]] = {}
    for cell in own:
        found.setdefault((cell["method"], cell["density"]), {})[cell.get("seed", 0)] = cell[figure]
    for method in METHODS:
        if any((method, density) in found for density in densities):
            rows.append(f"| {method} | {' | '.join(spread(found.get((method, d))) for d in densities)} |")
    return [*rows, "", *_against_the_next(found, densities, lower=figure == "perplexity")]


def _against_the_next(
    found: dict[tuple[str, float], dict[int, float]], densities: Sequence[float], *, lower: bool
) -> list[str]:
    """Per density, ours against the best rival, over the seeds that both have."""
    rows, sign = [], 1.0 if lower else -1.0
    for density in densities:
        ours = {seed: sign * value for seed, value in found.get((METHODS[-1], density), {}).items()}
        rivals = {
            m: {seed: sign * value for seed, value in found[m, density].items()}
            for m in METHODS[:-1]
            if (m, density) in found
        }
        best = next_best(ours, rivals)
        if best is not None:
            gaps = [ours[seed] - value for seed, value in best[1].items()]
            rows.append(f"- {100 * density:g} %: {_said(gaps, best[0])}")
    return [*rows, ""] if rows else []


def _said(gaps: Sequence[float], rival: str) -> str:
    """In words: paired differences to a rival, below 0 where ours is better."""
    mean = statistics.fmean(gaps)
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    way = "better" if mean < 0 else "worse"
    if abs(mean) > 2 * error:
        said = f"{way} than {rival}, the next best: by {abs(mean):.3f}"
    elif mean:
        said = f"level with {rival}, the next best: {way} by {abs(mean):.3f}"
    else:
        said = f"equal to {rival}, the next best"
    return f"{said}, standard error {error:.3f}, {len(gaps)} seeds"


def render(results: Path, page: Path) -> None:
    """Write the tables between the marks of the page."""
    put(page, BEGIN, END, tables(read_results(results)))
