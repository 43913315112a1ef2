"""gossamer compress: a model goes in, a verified sparse checkpoint comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import options as o
from . import trained as t
from .activation import activation_fields
from .failure import typed_command
from .job import run_job, show_plan
from .recipes import as_activation, as_options, build_machine, recipe_from_file, recipe_from_options

EXAMPLES = o.examples(
    "gossamer compress meta-llama/Llama-3.2-1B -o llama-sparse",
    "gossamer compress MODEL -o OUT --pattern 2:4 --calibration train.txt --eval test.txt",
    "gossamer compress MODEL -o OUT --method magnitude --no-eval --format dense",
    "gossamer compress MODEL -o OUT --values int8",
    "gossamer compress MODEL -o OUT --method nm-flow --pattern 1:8 --data train.txt --tokens 1000000",
    "gossamer compress MODEL -o OUT --recipe recipe.yaml --dry-run",
    "gossamer compress MODEL -o OUT --activation auto --activation-sparsity 0.5",
    "gossamer compress MODEL -o OUT --resume",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compress", epilog=EXAMPLES)(compress)


def compress(
    ctx: typer.Context,
    model: o.Model,
    out: o.Out,
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
    activation: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="Skip weights at decode: auto, rsparse, coreinfer, threshold, cats, wina. Alone it prunes nothing; "
            "with --method, --sparsity or --pattern it follows the pruning.",
            rich_help_panel=o.ACTIVATION,
            show_default=False,
        ),
    ] = None,
    activation_sparsity: Annotated[
        Optional[float],
        typer.Option(
            metavar="S",
            help="Share of the linear weights that a decoded token skips. \\[default: 0.5]",
            rich_help_panel=o.ACTIVATION,
            show_default=False,
        ),
    ] = None,
    target_ppl_increase: Annotated[
        Optional[str],
        typer.Option(
            metavar="P%",
            help="Instead: the highest sparsity whose perplexity rises by at most so much, such as 1%.",
            rich_help_panel=o.ACTIVATION,
            show_default=False,
        ),
    ] = None,
    target_speedup: Annotated[
        Optional[float],
        typer.Option(
            metavar="X",
            help="Instead: the lowest sparsity that makes the linear maps so much faster, measured here.",
            rich_help_panel=o.ACTIVATION,
            show_default=False,
        ),
    ] = None,
    activation_guide: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="coreinfer: stability or similarity. \\[default: stability]",
            rich_help_panel=o.ACTIVATION,
            show_default=False,
        ),
    ] = None,
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
    data: t.Data = None,
    tokens: t.Tokens = None,
    steps: t.Steps = None,
    learning_rate: t.LearningRate = None,
    pattern_for: t.PatternFor = None,
    fields: t.Fields = None,
    eval_data: o.Evaluation = None,
    no_eval: o.NoEvaluation = False,
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
    file_format: o.FileFormat = None,
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
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
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
    training = {
        "data": data, "tokens": tokens, "steps": steps, "learning_rate": learning_rate,
        "pattern_for": pattern_for or None, "set": fields or None,
    }  # fmt: skip
    skipping = {
        "method": activation, "sparsity": activation_sparsity, "target_ppl_increase": target_ppl_increase,
        "target_speedup": target_speedup, "guide": activation_guide,
    }  # fmt: skip
    evaluation = {"data": eval_data, "seqlen": eval_seqlen, "windows": eval_windows}
    export = {"format": file_format, "values": values, "max_shard_size": max_shard_size}
    general = {"seed": seed, "allow_overlap": allow_overlap or None}
    if recipe is None:
        skipping, training["set"] = activation_fields(skipping, method, fields or None)
        built = recipe_from_options(prune, training, evaluation, export, general, no_eval=no_eval, activation=skipping)
    else:
        given = {**prune, **training, **as_activation(skipping), **as_options(evaluation), **export, **general}
        built = recipe_from_file(recipe, given | {"no_eval": no_eval or None})
    job: dict[str, Any] = {
        "model": model, "out": out, "recipe": built, "machine": build_machine(device, dtype, max_memory),
        "revision": revision, "token": token, "trust_remote_code": trust_remote_code, "resume": resume,
        "overwrite": overwrite,
    }  # fmt: skip
    if dry_run:
        show_plan(job, json)
    else:
        run_job(job, typed_command(ctx), json, quiet)
