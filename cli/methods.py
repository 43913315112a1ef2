"""gossamer methods: the registry, one line per method."""

from __future__ import annotations

import typer

from . import options as o

EXAMPLES = o.examples("gossamer methods", "gossamer methods --json")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("methods", epilog=EXAMPLES)(methods)


def methods(json: o.Json = False) -> None:
    """List the pruning methods, built-in and from other packages, and the activation policies."""
    from ..activation_sparsity.registry import DEFAULT as POLICY
    from ..activation_sparsity.registry import SUMMARIES as POLICIES
    from ..pruning.registry import DEFAULT_METHOD, method_names, summary
    from .console import show_json, show_table

    names = method_names()
    if json:
        show_json([{"name": name, "summary": summary(name), "default": name == DEFAULT_METHOD} for name in names])
        return
    rows = [(f"{name} (default)" if name == DEFAULT_METHOD else name, summary(name)) for name in names]
    show_table(None, ("method", "what it does"), rows, numbers_from=2)
    policies = [(f"{name} (default)" if name == POLICY else name, POLICIES[name]) for name in POLICIES]
    show_table(None, ("--activation", "what is skipped at decode"), policies, numbers_from=2)
