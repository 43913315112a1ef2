"""gossamer inspect: what is in a checkpoint."""

from __future__ import annotations

from typing import Any

import typer

from . import options as o

EXAMPLES = o.examples(
    "gossamer inspect demo-sparse",
    "gossamer inspect meta-llama/Llama-3.2-1B --json",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("inspect", epilog=EXAMPLES)(inspect)


def inspect(
    model: o.Model,
    json: o.Json = False,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Show layers, sparsity, patterns, masks and bytes of MODEL. No weight is changed."""
    from ..compress.inspect import inspect_model
    from .console import show_json, show_lines, show_table

    found = inspect_model(model, revision=revision, token=token, trust_remote_code=trust_remote_code)
    if json:
        show_json(found)
        return
    header = ("tensor", "shape", "dtype", "sparsity", "pattern", "mask", "dense", "stored")
    show_table(str(model), header, [_row(row) for row in found["layers"]])
    show_lines(_totals(found))


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    from ..compress.report import human_bytes, percent

    return (
        row["key"],
        "x".join(map(str, row["shape"])),
        row["dtype"] if row["values"] is None else f"{row['dtype']} ({row['values']})",
        percent(row["sparsity"]),
        row["pattern"] or "-",
        _mask(row),
        human_bytes(row["dense_bytes"]),
        human_bytes(row["stored_bytes"]),
    )


def _mask(row: dict[str, Any]) -> str:
    if row["pattern"] is None:
        return "none"
    return "broken pattern" if row["holds_pattern"] is False else "explicit"


def _totals(found: dict[str, Any]) -> list[str]:
    from ..compress.report import human_bytes, percent

    size, sparsity = found["bytes"], found["sparsity"]
    counts = f"{found['parameters']:,} parameters, {found['prunable_parameters']:,} of them prunable"
    lines = [
        f"{counts}; {found['masks']} masks",
        f"sparsity: {percent(sparsity['prunable'])} of prunable, {percent(sparsity['all'])} of all parameters",
        f"bytes: {human_bytes(size['dense'])} dense, {human_bytes(size['stored'])} stored (ratio {size['ratio']:.3f})",
    ]
    return lines + ([f"note: {found['note']}"] if found["note"] else [])
