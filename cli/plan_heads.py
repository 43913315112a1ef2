"""gossamer plan-heads: how much of the past each KV head keeps, planned on text and written into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import RecipeError
from . import options as o
from .failure import typed_command
from .job import show_plan
from .recipes import build_machine, finished, given

if TYPE_CHECKING:
    from ..compress.recipe import Recipe

EXAMPLES = o.examples(
    "gossamer plan-heads MODEL -o OUT --density 0.5 --calibration chats.jsonl",
    "gossamer plan-heads MODEL -o OUT --density 0.25 --lengths 2048,4096,8192 --calibration DATA --answers own",
    "gossamer plan-heads MODEL -o OUT --method uniform --density 0.5 --calibration DATA",
    "gossamer plan-heads MODEL -o OUT --method moa --plan-file moa.json --calibration DATA",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("plan-heads", epilog=EXAMPLES)(plan_heads)


def plan_heads(
    ctx: typer.Context,
    model: o.Model,
    out: o.Out,
    method: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="gossamer, or a rival: uniform (StreamingLLM), per-layer, masformer, duo (scores, or --plan-file), "
            "moa (--plan-file). \\[default: gossamer]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        Optional[float],
        typer.Option(
            metavar="D",
            help="Fraction of keys and values that is kept, sinks included, at every length. \\[default: 0.5]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        Optional[str],
        typer.Option(
            metavar="N,N,...",
            help="Lengths to measure at. \\[default: 2048,4096,8192, or what the model's positions allow]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        Optional[str],
        typer.Option(
            metavar="all|group|fisher|moa",
            help="How a head's loss is predicted (docs/head-plans.md); all: group, and a plan of each other one. "
            "\\[default: all]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    sinks: Annotated[
        Optional[str],
        typer.Option(
            metavar="N,N,...",
            help="Numbers of first tokens a head may keep for good. \\[default: 0,4,16,64,128, or 0,1,4,8]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    block: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Step of the windows in tokens. \\[default: 64, or 16 for short lengths]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    solver: Annotated[
        Optional[str],
        typer.Option(
            metavar="relaxed|full",
            help="LP and repair, or the whole integer program. \\[default: relaxed]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[
        Optional[float],
        typer.Option(
            metavar="S",
            help="Seconds for the solver; what it has found by then is used. \\[default: 60]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    candidates: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Pareto plans that are judged on held-out text. \\[default: 6]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Variants of the best plan that are measured on calibration text. \\[default: 24]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    prefill: Annotated[
        Optional[str],
        typer.Option(
            metavar="plan|minference",
            help="minference: also search a sparse prefill pattern for every query head. \\[default: plan]",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    plan_file: Annotated[
        Optional[str],
        typer.Option(
            metavar="FILE",
            help="A DuoAttention pattern or a MoA plan to import.",
            rich_help_panel=o.HEADS,
            show_default=False,
        ),
    ] = None,
    calibration: o.Calibration = None,
    nsamples: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="Sequences per length. \\[default: 32]", rich_help_panel=o.DATA, show_default=False
        ),
    ] = None,
    answers: Annotated[
        Optional[str],
        typer.Option(
            metavar="given|own",
            help="Whose answers the loss counts: those of the text, or the model's own. \\[default: given]",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        Optional[str],
        typer.Option(
            metavar="DATA",
            help="Held-out text to choose by. \\[default: the end of the calibration text]",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = None,
    validation_samples: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="Held-out sequences. \\[default: 16]", rich_help_panel=o.DATA, show_default=False
        ),
    ] = None,
    probe: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Sequences of the retrieval probe; 0: none. \\[default: 8]",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        Optional[int],
        typer.Option(metavar="N", help="Seed. \\[default: 0]", rich_help_panel=o.DATA, show_default=False),
    ] = None,
    file_format: Annotated[
        Optional[str],
        typer.Option(
            "--format",
            metavar="sparse|dense|both",
            help="How the weights are written. \\[default: as they are in MODEL]",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Plan how much of the past each KV head of MODEL keeps, and write MODEL with its plan to OUT."""

    fields = {
        "method": method, "density": density, "lengths": _numbers(lengths, "--lengths"), "loss": loss,
        "sinks": _numbers(sinks, "--sinks"), "block": block, "solver": solver, "time_limit": time_limit,
        "candidates": candidates, "refine": refine, "prefill": prefill, "plan_file": plan_file,
        "calibration": calibration, "nsamples": nsamples, "answers": answers, "validation": validation,
        "validation_samples": validation_samples, "probe": probe,
    }  # fmt: skip
    job: dict[str, Any] = {
        "model": model, "out": out, "recipe": _recipe(fields, file_format or _form_of(model), seed),
        "machine": build_machine(device, dtype, None), "revision": revision, "token": token,
        "trust_remote_code": trust_remote_code, "resume": resume, "overwrite": overwrite,
    }  # fmt: skip
    if dry_run:
        show_plan(job, json)
    else:
        _run(job, typed_command(ctx), json, quiet)


def _recipe(fields: dict[str, Any], file_format: str, seed: int | None) -> Recipe:
    from ..compress.recipe import HeadsStage, build

    stage = build(HeadsStage, **given(fields))
    return finished([stage], {}, {"format": file_format}, {"seed": seed}, no_eval=True)


def _form_of(model: str) -> str:
    """The form that a local MODEL has its weights in; "dense" for one on the hub."""
    folder = Path(model)
    return "sparse" if any(folder.glob("model.sparse*.safetensors")) else "dense"


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"{option} {text!r} is not a list of whole numbers", hint=f"for instance {option} 128,256"
        ) from None


def _run(job: dict[str, Any], command: str, as_json: bool, quiet: bool) -> None:
    from .console import hush_libraries, show_json, show_lines, show_table, watch

    hush_libraries(quiet)
    from ..compress.headplans.show import candidate_rows, layer_rows, plan_lines, plan_rows
    from ..compress.run import compress as run

    with watch(quiet) as progress:
        report = run(**job, progress=progress, command=command)
    if as_json:
        show_json(report.data)
        return
    stage = next(stage for stage in report["stages"] if stage["stage"] == "heads")
    show_table(
        str(job["out"]), ("tokens", "KV kept", "KV bytes", "dense", "eFLOPs per token", "dense"), plan_rows(stage)
    )
    show_table("Density of every layer", *layer_rows(stage))
    show_table("Plans on held-out text", ("plan", "KL to dense", "loss", "retrieval", "chosen"), candidate_rows(stage))
    show_lines([*plan_lines(stage), *report.footer()])
