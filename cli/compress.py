"""gossamer compress: a model goes in, a verified sparse checkpoint comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import RecipeError
from . import options as o
from .failure import typed_command
from .job import run_job, show_plan

if TYPE_CHECKING:
    from ..compress.recipe import Machine, Recipe

EXAMPLES = o.examples(
    "gossamer compress meta-llama/Llama-3.2-1B -o llama-sparse",
    "gossamer compress MODEL -o OUT --pattern 2:4 --calibration train.txt --eval test.txt",
    "gossamer compress MODEL -o OUT --method magnitude --no-eval --format dense",
    "gossamer compress MODEL -o OUT --values int8",
    "gossamer compress MODEL -o OUT --recipe recipe.yaml --dry-run",
    "gossamer compress MODEL -o OUT --resume",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compress", epilog=EXAMPLES)(compress)


def compress(
    ctx: typer.Context,
    model: o.Model,
    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write.", show_default=False)
    ],
    method: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="What to zero; `gossamer methods` lists them. \\[default: gossamer]",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    sparsity: Annotated[
        Optional[float],
        typer.Option(
            metavar="S",
            help="Fraction of zeros, in \\[0, 1). \\[default: 0.5]",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    pattern: Annotated[
        Optional[str],
        typer.Option(
            metavar="N:M",
            help="N:M keeps N of every M inputs (2:4, 4:8, ...); block:4x8 prunes whole blocks.",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    allocation: Annotated[
        Optional[str],
        typer.Option(
            metavar="uniform|owl",
            help="How the sparsity is spread over the blocks: evenly, or by outliers. \\[default: uniform]",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        Optional[str],
        typer.Option(
            metavar="row|matrix|model",
            help="Scores are compared within it. \\[default: the method's own]",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    reconstruct: Annotated[
        bool,
        typer.Option(
            "--reconstruct",
            help="Afterwards fit attention and MLP to the dense outputs, locally.",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = False,
    include: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="REGEX",
            help="Prune only matching matrices; repeatable.",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="REGEX",
            help="Leave matching matrices dense; repeatable.",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie",
            help="Give the head a weight of its own, so that it can be pruned.",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = False,
    recipe: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FILE",
            help="Read the stages from a YAML file instead of the options above and below.",
            rich_help_panel=o.PRUNING,
            show_default=False,
        ),
    ] = None,
    calibration: o.Calibration = None,
    nsamples: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="Calibration windows. \\[default: 128]", rich_help_panel=o.DATA, show_default=False
        ),
    ] = None,
    seqlen: o.SequenceLength = None,
    eval_data: o.Evaluation = None,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Skip the evaluation.", rich_help_panel=o.DATA, show_default=False)
    ] = False,
    eval_seqlen: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Tokens per evaluation window. \\[default: as --seqlen]",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = None,
    eval_windows: o.Windows = None,
    allow_overlap: Annotated[
        bool,
        typer.Option(
            "--allow-overlap",
            help="Evaluate although the text was seen in calibration; the report says so.",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = False,
    seed: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Seed of the calibration windows. \\[default: 0]",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = None,
    file_format: Annotated[
        Optional[str],
        typer.Option(
            "--format",
            metavar="sparse|dense|both",
            help="What to write. \\[default: sparse]",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = None,
    values: Annotated[
        Optional[str],
        typer.Option(
            metavar="same|int8",
            help="Kept weights of pruned matrices: as they are, or rounded to 8 bits with a scale per 128 inputs: "
            "smaller, and lossy; the perplexity is that of the rounded weights. \\[default: same]",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, print the plan, write nothing.",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on after the last finished block.", rich_help_panel=o.OUTPUT, show_default=False
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace what is in OUT.", rich_help_panel=o.OUTPUT, show_default=False),
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    max_memory: o.MaxMemory = None,
    max_shard_size: Annotated[
        Optional[str],
        typer.Option(
            metavar="SIZE", help="Largest weight file. \\[default: 5GB]", rich_help_panel=o.ADVANCED, show_default=False
        ),
    ] = None,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Write a sparse copy of MODEL to OUT and print perplexity, sparsity and bytes before and after."""
    prune = {
        "method": method, "sparsity": sparsity, "pattern": pattern, "allocation": allocation, "scope": scope,
        "reconstruct": reconstruct or None, "include": include or None, "exclude": exclude or None,
        "untie": untie or None, "calibration": calibration, "nsamples": nsamples, "seqlen": seqlen,
    }  # fmt: skip
    evaluation = {"data": eval_data, "seqlen": eval_seqlen, "windows": eval_windows}
    export = {"format": file_format, "values": values, "max_shard_size": max_shard_size}
    general = {"seed": seed, "allow_overlap": allow_overlap or None}
    if recipe is None:
        built = recipe_from_options(prune, evaluation, export, general, no_eval=no_eval)
    else:
        built = recipe_from_file(
            recipe, {**prune, **_as_options(evaluation), "no_eval": no_eval or None, **export, **general}
        )
    job: dict[str, Any] = {
        "model": model, "out": out, "recipe": built, "machine": build_machine(device, dtype, max_memory),
        "revision": revision, "token": token, "trust_remote_code": trust_remote_code, "resume": resume,
        "overwrite": overwrite,
    }  # fmt: skip
    if dry_run:
        show_plan(job, json)
    else:
        run_job(job, typed_command(ctx), json, quiet)


def recipe_from_options(
    prune: dict[str, Any],
    evaluation: dict[str, Any],
    export: dict[str, Any],
    general: dict[str, Any],
    *,
    no_eval: bool,
) -> Recipe:
    """The recipe of the options, where None means "not given". RecipeError when they contradict each other."""
    from ..compress.recipe import EvaluateStage, ExportStage, PruneStage, Recipe, build

    stages = [build(PruneStage, **_given(prune))]
    if not no_eval:
        stages.append(build(EvaluateStage, **_given(evaluation)))
    elif _given(evaluation):
        raise RecipeError(f"--no-eval contradicts {_spelled(_as_options(evaluation))}", hint="give one of them")
    stages.append(build(ExportStage, **_given(export)))
    return build(Recipe, stages=stages, **_given(general))


def recipe_from_file(file: Path, options: dict[str, Any]) -> Recipe:
    """The recipe of a YAML file. RecipeError when any of `options` was given too: the file holds all of it."""
    from ..compress.recipe import load_recipe

    if _given(options):
        raise RecipeError(
            f"--recipe cannot be combined with {_spelled(options)}", hint="write the values into the recipe file"
        )
    return load_recipe(file)


def build_machine(device: str | None, dtype: str | None, max_memory: str | None) -> Machine:
    """Machine options; RecipeError for a value that is not allowed."""
    from ..compress.recipe import Machine, build

    return build(Machine, **_given({"device": device, "dtype": dtype, "max_memory": max_memory}))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _as_options(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Fields of the evaluate stage under the names of their options."""
    return {"eval" if name == "data" else f"eval_{name}": value for name, value in evaluation.items()}


def _spelled(options: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in _given(options))
