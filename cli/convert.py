"""gossamer convert: between the sparse and the dense form of a checkpoint, without loss unless it is asked to round."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import RecipeError
from . import options as o

EXAMPLES = o.examples(
    "gossamer convert demo-sparse demo-dense --to dense",
    "gossamer convert old-bitmask-checkpoint new --to sparse",
    "gossamer convert demo-sparse demo-int8 --to sparse --values int8",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert", epilog=EXAMPLES)(convert)


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A checkpoint folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.", show_default=False)],
    to: Annotated[str, typer.Option("--to", metavar="dense|sparse", help="The form to write.", show_default=False)],
    values: Annotated[
        str,
        typer.Option(
            metavar="same|int8",
            help="same: floats, bit for bit. int8: round kept weights to 8 bits with a scale per 128 inputs; lossy.",
        ),
    ] = "same",
    masks_from_zeros: Annotated[
        bool,
        typer.Option(
            "--masks-from-zeros",
            help="IN has no masks: take its exact zeros for pruned weights.",
            rich_help_panel=o.ADVANCED,
            show_default=False,
        ),
    ] = False,
    overwrite: o.Overwrite = False,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
) -> None:
    """Write IN as a dense or as a sparse checkpoint. Every weight keeps its bits; masks are kept either way.

    Only --values int8 changes weights: those of matrices with masks are rounded. Without it, int8 values of IN are
    written as the floats that they stand for.

    The old compressed-tensors bitmask layout is read too. Zeros of a checkpoint without masks are not taken for pruned
    weights unless --masks-from-zeros says so.
    """
    if to not in ("dense", "sparse"):
        raise RecipeError(f"--to {to!r} is unknown; allowed: dense, sparse")
    from ..compress.convert import convert as run
    from .console import show_json, show_lines, show_note

    if values == "int8":
        show_note("int8 values are lossy: kept weights that have none yet are rounded; gossamer eval tells the cost")
    files = run(
        source,
        out,
        to,
        values=values,
        masks_from_zeros=masks_from_zeros,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    if json:
        show_json({"output": str(out), "to": to, "values": values, "files": [str(file) for file in files]})
    else:
        show_lines([f"{out} holds the {to} checkpoint"])
