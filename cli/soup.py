"""gossamer soup: checkpoints that were trained apart from one pruned parent, averaged."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ..errors import RecipeError
from . import options as o

EXAMPLES = o.examples(
    "gossamer soup seed-0 seed-1 seed-2 -o averaged",
    "gossamer soup A B C -o OUT --data heldout.txt",
    "gossamer soup A B -o OUT --weights 0.7,0.3",
)

MARGIN = 1.0


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("soup", epilog=EXAMPLES)(soup)


def soup(
    models: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="Checkpoints with the same masks.", show_default=False)
    ],
    out: o.Out,
    weights: Annotated[
        Optional[str],
        typer.Option(
            metavar="W,W,...",
            help="How much of each. \\[default: equal parts, or what helps on --data]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="DATA",
            help="Held-out text, of instructions the responses: compare candidates, ensemble and soups on it, and "
            "write the greedy soup.",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            metavar="X", help="Standard errors by which a further candidate must help.", rich_help_panel=o.DATA
        ),
    ] = MARGIN,
    seqlen: o.SequenceLength = None,
    windows: o.Windows = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Average checkpoints that were trained apart from one pruned parent into one, under the masks that they share.

    Different masks, shapes or tokenizers are refused: the average would not be sparse, or would mean nothing.
    """
    from .console import hush_libraries, show_json, show_lines, watch

    shares = _numbers(weights)
    if data is None:
        given = {"--margin": margin != MARGIN, "--seqlen": seqlen is not None, "--windows": windows is not None}
        if used := [name for name, is_given in given.items() if is_given]:
            raise RecipeError(f"{', '.join(used)} without --data: nothing is compared", hint="add --data FILE")
    hush_libraries(quiet)
    from ..compress.averaging import average_checkpoints

    with watch(quiet) as progress:
        report = average_checkpoints(
            models,
            out,
            weights=shares,
            data=data,
            margin=margin,
            seqlen=seqlen,
            windows=128 if windows is None else windows,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json:
        show_json(report)
        return
    parts = ", ".join(f"{weight:.3f} {name}" for weight, name in zip(report["weights"], report["models"], strict=True))
    lines = [f"{out} holds the average: {parts}"]
    if (found := report.get("compared")) is not None:
        lines.append(f"loss on {found['text']} (nats/token):")
        lines += [f"  {name} {loss:.4f}" for name, loss in zip(report["models"], found["candidates"], strict=True)]
        lines += [f"  {name} soup {entry['loss']:.4f}" for name, entry in found["soups"].items()]
        lines.append(f"  prediction ensemble {found['ensemble']:.4f}")
    show_lines(lines)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--weights {text!r} is not understood", hint="numbers with commas, such as 0.7,0.3"
        ) from None
