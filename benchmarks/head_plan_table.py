"""The tables of docs/head-plans.md from the lines of head_plans.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import put
from quality import read_results

METHODS = ["uniform", "per-layer", "masformer", "duo", "moa", "gossamer"]
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown of everything measured; the later of two lines of one cell counts."""
    known = {(c["suite"], c["model"], c["density"], c["method"]): c for c in lines}
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
    for method in METHODS:
        found = [known.get((suite, model, density, method)) for density in densities]
        if any(found):
            rows.append(f"| {method} | {' | '.join('-' if c is None else f'{c[figure]:.4g}' for c in found)} |")
    return [*rows, ""]


def render(results: Path, page: Path) -> None:
    """Write the tables between the marks of the page."""
    put(page, BEGIN, END, tables(read_results(results)))
