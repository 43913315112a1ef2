"""gossamer adapter: what is in an adapter, the difference and the sum of several, and merging one into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import RecipeError
from . import options as o
from .failure import typed_command
from .job import run_job, show_plan
from .recipes import build_machine, finished

INFO = o.examples("gossamer adapter info OUT/gossamer/adapter-0", "gossamer adapter info my-adapter --json")
DIFF = o.examples(
    "gossamer adapter diff first-adapter second-adapter",
    "gossamer adapter diff first-adapter second-adapter -o difference",
)
COMPOSE = o.examples(
    "gossamer adapter compose maths code -o both",
    "gossamer adapter compose maths:0.7 code:0.3 -o blend",
    "gossamer adapter compose tuned:-1 -o forget",
)
MERGE = o.examples(
    "gossamer adapter merge MODEL my-adapter -o merged",
    "gossamer adapter merge pruned-model my-adapter -o merged --format dense",
)

_Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the group to the application."""
    group = typer.Typer(
        no_args_is_help=True, rich_markup_mode="rich", epilog=INFO, help="Adapters: look into, compare, add up, merge."
    )
    group.command("info", epilog=INFO)(info)
    group.command("diff", epilog=DIFF)(diff)
    group.command("compose", epilog=COMPOSE)(compose)
    group.command("merge", epilog=MERGE)(merge)
    app.add_typer(group, name="adapter")


def info(adapter: _Adapter, json: o.Json = False) -> None:
    """Show method, base, entries and bytes of ADAPTER. No model is loaded."""
    from ..compress.adapterinfo import adapter_info
    from ..compress.report import human_bytes
    from .console import show_json, show_lines, show_table

    found = adapter_info(adapter)
    if json:
        show_json(found)
        return
    rows = [
        (row["layer"], f"{row['rows']:,}", f"{row['entries']:,}", human_bytes(row["bytes"]), f"{row['norm']:.4g}")
        for row in found["layers"]
    ]
    show_table(adapter, ("layer", "rows", "entries", "bytes", "norm"), rows)
    each = f", {found['bytes_per_entry']:.2f} bytes per entry" if found["bytes_per_entry"] else ""
    lines = [f"method {found['method']}: {found['entries']:,} entries, {human_bytes(found['bytes'])}{each}"]
    if found["other_tensors"]:
        lines.append(f"{len(found['other_tensors'])} tensors of other kinds")
    show_lines(lines)


def diff(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="An adapter's folder.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Another one.", show_default=False)],
    out: Annotated[
        Optional[Path],
        typer.Option(
            "-o", "--output", metavar="OUT", help="Write FIRST - SECOND as an adapter.", show_default=False,
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    json: o.Json = False,
) -> None:  # fmt: skip
    """Compare two adapters of sparse deltas: positions that both have, cosine, distance. No model is loaded."""
    from ..compress.adapters import diff_adapters
    from .console import show_json, show_lines, show_table

    found = diff_adapters(first, second, out)
    if json:
        show_json(found)
        return
    rows = [
        (
            row["layer"],
            f"{row['entries'][0]:,}",
            f"{row['entries'][1]:,}",
            f"{row['shared']:,}",
            f"{row['distance']:.4g}",
        )
        for row in found["layers"]
    ]
    show_table(f"{first} - {second}", ("layer", "first", "second", "shared", "distance"), rows)
    lines = [
        f"{found['shared']:,} positions shared ({found['overlap']:.1%} of all), cosine {found['cosine']:.4f}, "
        f"distance {found['distance']:.4g}"
    ]
    show_lines(lines + ([f"{out} holds the difference"] if out else []))


def compose(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...", help="Adapters' folders, each with its weight.", show_default=False
        ),
    ],
    out: o.Out,
    json: o.Json = False,
) -> None:
    """Write the weighted sum of adapters of sparse deltas as one adapter, at the union of their positions."""
    from ..compress.adapters import combine
    from .console import show_json, show_lines

    found = combine([_weighted(text) for text in adapters], out)
    if json:
        show_json(found)
    else:
        show_lines([f"{out} holds an adapter of {found['entries']:,} entries"])


def merge(
    ctx: typer.Context,
    model: o.Model,
    adapter: _Adapter,
    out: o.Out,
    any_base: Annotated[
        bool,
        typer.Option(
            "--any-base", help="Merge although the adapter was trained on other weights.", show_default=False,
            rich_help_panel=o.ADVANCED,
        ),
    ] = False,
    file_format: Annotated[
        Optional[str],
        typer.Option(
            "--format", metavar="sparse|dense|both", help="What to write. \\[default: sparse]", show_default=False,
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print the plan, write nothing.", rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    device: o.Device = None,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Write MODEL with ADAPTER in its weights to OUT. Zeros of a pruned model stay zeros.

    Sums are rounded once, to the dtype of MODEL; the report says how many entries were below that.
    """
    from ..compress.recipe import MergeStage, build

    stage = build(MergeStage, adapter=adapter, check_base=not any_base)
    job: dict[str, Any] = {
        "model": model,
        "out": out,
        "recipe": finished([stage], {}, {"format": file_format}, {}, no_eval=True),
        "machine": build_machine(device, None, None),
        "revision": revision,
        "token": token,
        "trust_remote_code": trust_remote_code,
        "overwrite": overwrite,
    }
    if dry_run:
        show_plan(job, json)
    else:
        run_job(job, typed_command(ctx), json, quiet)


def _weighted(text: str) -> tuple[str, float]:
    """FOLDER or FOLDER:WEIGHT; a folder with a colon in its name needs a weight."""
    folder, colon, number = text.rpartition(":")
    if not colon or not folder:
        return text, 1.0
    try:
        return folder, float(number)
    except ValueError:
        raise RecipeError(
            f"{text!r} is not understood", hint="write FOLDER or FOLDER:WEIGHT, such as maths:0.5"
        ) from None
