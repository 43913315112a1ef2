"""gossamer convert: between the sparse and the dense form of a checkpoint, without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RecipeError
from . import options as o

EXAMPLES = o.examples(
    "gossamer convert demo-sparse demo-dense --to dense",
    "gossamer convert old-bitmask-checkpoint new --to sparse",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert", epilog=EXAMPLES)(convert)


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A checkpoint folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="dense|sparse", help="The form to write.", show_default=False)],
    json: o.Json = False,
) -> None:
    """Write IN as a dense or as a sparse checkpoint. Every weight keeps its bits; masks are kept either way.

    The old compressed-tensors bitmask layout is read too.
    """
    if to not in ("dense", "sparse"):
        raise RecipeError(f"--to {to!r} is unknown; allowed: dense, sparse")
    from ..compress.convert import convert as run
    from .console import show_json, show_lines

    files = run(source, out, to)
    if json:
        show_json({"output": str(out), "to": to, "files": [str(file) for file in files or []]})
    else:
        show_lines([f"{out} holds the {to} checkpoint"])
