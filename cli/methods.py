"""gossamer methods: the registry, one line per method."""

from __future__ import annotations

from typing import Any

import typer

from . import options as o
from .trained import trained_methods

EXAMPLES = o.examples("gossamer methods", "gossamer methods --json")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("methods", epilog=EXAMPLES)(methods)


def methods(json: o.Json = False) -> None:
    """List what `compress` takes: one-shot methods, own and of other packages, those that train, and policies."""
    from ..activation_sparsity.registry import DEFAULT as POLICY
    from ..activation_sparsity.registry import SUMMARIES as POLICIES
    from ..pruning.registry import DEFAULT_METHOD, method_names, summary
    from .console import show_json, show_table

    found: list[dict[str, Any]] = [{"name": name, "summary": summary(name), "trains": False} for name in method_names()]
    found += [{"name": name, "summary": text, "trains": True} for name, text in trained_methods().items()]
    if json:
        show_json([row | {"default": row["name"] == DEFAULT_METHOD} for row in found])
        return
    rows = [
        (f"{row['name']} (default)" if row["name"] == DEFAULT_METHOD else row["name"], row["summary"]) for row in found
    ]
    show_table(None, ("method", "what it does"), rows, numbers_from=2)
    policies = [(f"{name} (default)" if name == POLICY else name, POLICIES[name]) for name in POLICIES]
    show_table(None, ("--activation", "what is skipped at decode"), policies, numbers_from=2)
