"""gossamer windows: a head plan for engines that have one window per layer."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from . import options as o

EXAMPLES = o.examples(
    "gossamer windows planned-model",
    "gossamer windows planned-model --engine tensorrt-llm",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("windows", epilog=EXAMPLES)(windows)


def windows(
    model: o.Model,
    engine: Annotated[
        Literal["transformers", "tensorrt-llm"],
        typer.Option(help="transformers: entries for config.json; tensorrt-llm: arguments of KvCacheConfig."),
    ] = "transformers",
    revision: o.Revision = None,
    token: o.Token = None,
) -> None:
    """Print MODEL's head plan as one window per layer, as JSON. Only plans with one fixed rule per layer fit."""
    from ..compress.enginewindows import engine_windows
    from .console import show_json

    show_json(engine_windows(model, engine, revision=revision, token=token))
