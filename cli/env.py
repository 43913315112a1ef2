"""gossamer env: versions and machine, for a bug report."""

from __future__ import annotations

from typing import Any

import typer

from . import options as o

EXAMPLES = o.examples("gossamer env", "gossamer env --json")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("env", epilog=EXAMPLES)(env)


def env(json: o.Json = False) -> None:
    """Print versions, processor features, threads, memory and GPUs."""
    from ..compress.environment import describe_environment
    from .console import show_json, show_lines

    found = describe_environment()
    if json:
        show_json(found)
    else:
        show_lines(f"{key}: {_text(value)}" for key, value in found.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
