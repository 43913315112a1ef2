"""gossamer demo: make a small model to try things on."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from . import options as o

EXAMPLES = o.examples(
    "gossamer demo demo-model",
    "gossamer compress demo-model -o demo-sparse --calibration demo-model/calibration.txt "
    "--eval demo-model/heldout.txt",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", epilog=EXAMPLES)(demo)


def demo(
    folder: o.NewFolder,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the weights and of the training windows.")] = 0,
    steps: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Training steps; fewer make a worse model sooner. \\[default: 540]",
            show_default=False,
        ),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a small Llama on the documentation of the Python standard library, and save it to DIR.

    Takes at most three minutes on two cores and no network. DIR also gets calibration.txt and heldout.txt.
    """
    from ..compress.demo import make_demo
    from .console import hush_libraries, show_json, show_lines, watch

    hush_libraries()  # saving shows a bar of one step
    with watch(quiet) as progress:
        progress.working("collecting text")
        result = make_demo(
            folder, seed=seed, steps=steps,
            progress=lambda step, total, loss: progress.working(f"training: step {step}/{total}, loss {loss:.3f}"),
        )  # fmt: skip
    if json:
        show_json(result.as_dict())
        return
    show_lines(
        [
            f"{result.folder}: {result.parameters:,} parameters, {result.steps} steps, {result.seconds:.0f} s",
            f"held-out perplexity {result.perplexity:.2f}",
        ]
    )
