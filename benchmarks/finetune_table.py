"""docs/quality-finetune.md from the lines of finetune.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from suite import paired, spread

Cell = Mapping[str, Any]
KIND = ("task", "tokens", "base_quant")  # what a table has in common
CLAIMS = (("spiel-ag", "lora"), ("spiel-ag", "static"), ("spiel-ma", "static"))


def render(cells: Sequence[Cell], models: Mapping[str, tuple[str, int]], seqlen: int, windows: int) -> str:
    """The whole page. `models`: task -> the model that it trains, and the weights of the matrices beside adapters."""
    parts = [_INTRODUCTION.format(seqlen=seqlen, windows=windows)]
    for kind in dict.fromkeys(tuple(cell.get(name) for name in KIND) for cell in cells if cell["method"] != "base"):
        task, tokens, quant = kind
        group = [cell for cell in cells if tuple(cell.get(name) for name in KIND) == kind and cell["method"] != "base"]
        untouched = next((c for c in cells if c["task"] == task and c["method"] == "base"), None)
        beside = f", beside a base in {quant}" if quant else ""
        model, weights = models[task]
        parts.append(f"## {task}, {model}, {tokens:,} tokens{beside}\n")
        if untouched is not None:
            parts.append(
                f"Untouched: {untouched['test']:.3f} on the test text, {untouched['before']:.3f} on the old.\n"
            )
        parts += [*_table(group, weights), ""]
        claims = [line for rank in sorted({cell["rank"] for cell in group}) for line in _claims(group, rank)]
        parts += [*claims, ""] if claims else []
    return "\n".join(parts)


def chosen(group: Sequence[Cell], rank: int, method: str) -> list[Cell]:
    """The lines at the learning rate with the lowest held-out loss of the first seed; of one seed's lines the last."""
    own = [cell for cell in group if cell["rank"] == rank and cell["method"] == method]
    if not own:
        return []
    first = min(cell["seed"] for cell in own)
    tried = {cell["learning_rate"]: cell["heldout"] for cell in own if cell["seed"] == first}
    rate = min(tried, key=lambda rate: tried[rate])
    return list({cell["seed"]: cell for cell in own if cell["learning_rate"] == rate}.values())


def _rate(group: Sequence[Cell], found: Sequence[Cell]) -> str:
    """The rate of the lines, and whether the search ended at the edge of what was tried."""
    rank, method, rate = (found[0][name] for name in ("rank", "method", "learning_rate"))
    tried = {cell["learning_rate"] for cell in group if (cell["rank"], cell["method"]) == (rank, method)}
    return f"{rate:g}" if min(tried) < rate < max(tried) else f"{rate:g} (edge)"


def _table(group: Sequence[Cell], weights: int) -> list[str]:
    lines = [
        "| rank | method | entries | density | rate | test perplexity | old text | peak, MB | s | file, MB | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = dict.fromkeys((cell["rank"], cell["method"]) for cell in group)
    for rank, method in sorted(rows, key=lambda row: row[0] or math.inf):  # without a rank: last
        found = chosen(group, rank, method)
        first = found[0]
        density = f"{first['trained'] / weights:.2%}" if rank else "-"
        lines.append(
            f"| {rank or '-'} | {method} | {first['trained']:,} | {density} | {_rate(group, found)} | "
            f"{spread({cell['seed']: cell['test'] for cell in found})} | "
            f"{statistics.fmean(cell['before'] for cell in found):.2f} | {max(c['peak'] for c in found) / 1e6:.0f} | "
            f"{statistics.median(cell['seconds'] for cell in found):.0f} | {first['file'] / 1e6:.2f} | {len(found)} |"
        )
    return lines


def _claims(group: Sequence[Cell], rank: int) -> list[str]:
    lines = []
    for ours, theirs in CLAIMS:
        left, right = (
            {cell["seed"]: cell["test"] for cell in chosen(group, rank, method)} for method in (ours, theirs)
        )
        if left and right:
            lines.append(f"- rank {rank}, {ours} - {theirs}: {paired(left, right)}")
    return lines


_INTRODUCTION = """# Quality of fine-tuning

Perplexity on {windows} windows of {seqlen} tokens of a text that the model was not trained on before, and of the one
that it was (old text: forgetting), made by `python benchmarks/finetune_quality.py --render`. Every adapter trains as
many numbers as LoRA of the rank (density: per weight of the matrices it lies beside), for as many tokens. Learning
rates are searched until the best lies between two worse ones ("edge": not so), by the loss on the held-out split of the
training text, with the first seed; the test text has no say. Mean over seeds, the smallest and the largest in brackets.
Seconds are those of the whole command, median over seeds, one thread of a machine with other work, and some runs were
paused; `full` trains all weights, and is what a dense model comes to with the same tokens.
"""
