"""The report as Markdown, and as a part of a page that is otherwise written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import RecipeError

BEGIN, END = "<!-- bench kernels -->", "<!-- /bench kernels -->"


def markdown(report: dict[str, Any]) -> str:
    """One table per shape under a line about the machine."""
    told = report["machine"]
    lines = [
        f"{told['processor']}, tier {told['tier']}, {told['threads']} threads, weights {told['dtype']}, torch "
        f"{told['torch']}, {told['date']}; best decile (and median) of {told['rounds']} rounds. Speedup: over the "
        "fastest dense product, for dense products over the fastest other one, for MLPs over three of the fastest; "
        "for what is no product over the fastest way of torch.",
    ]
    for result in report["shapes"] + report["token"]:
        head = f"{result['title']}, read bandwidth {result['read_gb_s']} GB/s"
        lines += ["", f"| {head} | us | GB/s | of bandwidth | speedup | must |", "|---|---|---|---|---|---|"]
        lines += [_line(entry) for entry in result["cases"]]
    return "\n".join(lines) + "\n"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The report as it is."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def failures(report: dict[str, Any]) -> list[str]:
    """One line per wrong result."""
    return [
        f"{entry['name']} on {result['title']}: {entry['error']}"
        for result in report["shapes"] + report["token"]
        for entry in result["cases"]
        if entry["error"]
    ]


def check_page(path: Path) -> None:
    """Raises RecipeError unless `write_page` may write there: a new file, or one with the two marks."""
    if path.exists():
        _, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        if not begin or END not in rest:
            raise RecipeError(
                f"{path} exists and has no lines {BEGIN} and {END} to write between",
                hint="add the two lines, or name a new file",
            )


def write_page(path: Path, text: str) -> None:
    """Puts the text between the two marks of a page; a new page has nothing else."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def _line(entry: dict[str, Any]) -> str:
    if entry["error"]:
        return f"| {entry['name']} | wrong result: {entry['error']} | | | | |"
    times = f"{entry['us']['decile']:.0f} ({entry['us']['median']:.0f})"
    speedup = "" if entry["speedup"] is None else f"{entry['speedup']:.2f}"
    cells = [entry["name"], times, f"{entry['gb_s']:.1f}", f"{entry['share_of_read']:.0%}", speedup, _verdict(entry)]
    return "| " + " | ".join(cells) + " |"


def _verdict(entry: dict[str, Any]) -> str:
    told = []
    if entry["must"] is not None and entry["speedup"] is not None:
        told.append(f"{entry['must']} {_met(entry['speedup'] >= entry['must'])}")
    if entry["must_share"] is not None:
        told.append(f"{entry['must_share']:.0%} {_met(entry['share_of_read'] >= entry['must_share'])}")
    return ", ".join(told)


def _met(yes: bool) -> str:
    return "met" if yes else "MISSED"
