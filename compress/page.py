"""report.html: the report as one page that needs no other file, for people; report.json is for programs."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from .checkpoint import atomic_write_text
from .report import Report, percent

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); }
.note { color: #b00; }
"""


PICTURE = "gossamer/layers.png"


def write_picture(folder: Path, picture: bytes | None) -> None:
    """The picture as a file for the model card. One that came with the source model is not left behind."""
    path = folder / PICTURE
    if picture is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture)


def write_page(folder: Path, report: Report, recipe: str, picture: bytes | None, trained: bytes | None = None) -> None:
    """Write report.html into `folder`; the pictures (PNG), of matrices and of training, are embedded."""
    atomic_write_text(folder / "report.html", page_text(report, recipe, picture, trained))


def page_text(report: Report, recipe: str, picture: bytes | None, trained: bytes | None = None) -> str:
    """The page. Everything that comes from outside is escaped."""
    title = html.escape(report["output"])
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{html.escape(report['model'])} at {percent(report['sparsity']['prunable'])} zeros among the prunable "
        "weights.</p>",
        _table(("", "before", "after"), report.rows()),
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in report.footer()) + "</ul>",
        _image(picture, "error and sparsity of every kind of matrix"),
        _image(trained, "loss and sparsity while it was trained"),
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(report['command'] or 'through the Python API')}</pre>",
        f"<pre>{html.escape(recipe)}</pre>",
        f"<details><summary>{len(report['layers'])} matrices</summary>{_layers(report)}</details>",
        _skipped(report),
        "<h2>Where</h2>",
        _table(("", ""), [(key, str(value)) for key, value in report["environment"].items()]),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def _image(picture: bytes | None, said: str) -> str:
    if picture is None:
        return ""
    data = base64.b64encode(picture).decode("ascii")
    return f'<p><img alt="{said}" src="data:image/png;base64,{data}"></p>'


def _layers(report: Report) -> str:
    head = ("matrix", "shape", "pattern", "method", "zeros", "error before update", "error", "s")
    rows = [
        (
            row["name"],
            "x".join(map(str, row["shape"])),
            row["pattern"],
            row["method"],
            percent(row["sparsity"]),
            _number(row["error_before"]),
            _number(row["error_after"]),
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
        )
        for row in report["layers"]
    ]
    return _table(head, rows)


def _skipped(report: Report) -> str:
    if not report["skipped"]:
        return ""
    rows = [(entry["name"], entry["reason"]) for entry in report["skipped"]]
    return f"<details><summary>{len(rows)} left as they were</summary>{_table(('matrix', 'why'), rows)}</details>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3e}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table>"]
    if any(head):
        lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
