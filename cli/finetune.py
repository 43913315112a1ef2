"""gossamer finetune: train a model under its masks; none of its zeros is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..errors import RecipeError
from . import options as o
from .compress import build_machine
from .failure import typed_command
from .job import run_job, show_plan

EXAMPLES = o.examples(
    "gossamer finetune llama-sparse -o llama-recovered --data train.txt",
    "gossamer finetune OUT -o OUT2 --method full --data instructions.jsonl --tokens 5000000 --learning-rate 1e-4",
    "gossamer finetune OUT -o OUT2 --method bias-norm --data train.txt --eval test.txt --set batch=16",
    "gossamer finetune MODEL -o OUT2 --method spiel-ag --rank-equivalent 8 --data train.txt",
    "gossamer finetune OUT -o OUT2 --data train.txt --set loss=distill",
    "accelerate launch --num_processes 4 -m gossamer finetune OUT -o OUT2 --data train.txt",
    "gossamer finetune OUT -o OUT2 --data train.txt --resume",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("finetune", epilog=EXAMPLES)(finetune)


def finetune(
    ctx: typer.Context,
    model: o.Model,
    out: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write.", show_default=False)
    ],
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="DATA",
            help="What to train on: a text, JSONL or Parquet file, a folder, or a dataset id. Of records with prompt "
            "and response, or messages, only the responses are learned. A tenth is held out. \\[default: c4]",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="masklora: low-rank updates under the masks. bias-norm: biases and norms only. full: everything. "
            "spiel-ag, spiel-ma: sparse deltas whose positions move. static: sparse deltas at fixed positions. lora: "
            "plain low-rank updates, on dense models. \\[default: masklora]",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="Tokens to train on. \\[default: 1000000]", rich_help_panel=o.TRAINING, show_default=False
        ),
    ] = None,
    steps: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="Optimizer steps, instead of tokens.", rich_help_panel=o.TRAINING, show_default=False
        ),
    ] = None,
    learning_rate: Annotated[
        Optional[float],
        typer.Option(
            metavar="RATE",
            help="The highest one. \\[default: the method's own]",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    fields: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of the stage, such as batch=16, rank=32 or loss=distill; repeatable.",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        Optional[float],
        typer.Option(
            metavar="SHARE",
            help="Of the weights that sparse deltas train. \\[default: 0.01]",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    num_weights: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", help="Their number, instead of a share.", rich_help_panel=o.TRAINING, show_default=False
        ),
    ] = None,
    rank_equivalent: Annotated[
        Optional[float],
        typer.Option(
            metavar="RANK",
            help="As many of them as LoRA of this rank trains.",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    seqlen: o.SequenceLength = None,
    eval_data: o.Evaluation = None,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Skip the evaluation.", rich_help_panel=o.DATA, show_default=False)
    ] = False,
    eval_windows: o.Windows = None,
    allow_overlap: Annotated[
        bool,
        typer.Option(
            "--allow-overlap",
            help="Evaluate although the text was trained on; the report says so.",
            rich_help_panel=o.DATA,
            show_default=False,
        ),
    ] = False,
    seed: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Seed of the order of the text and of what is drawn. \\[default: 0]",
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
        typer.Option("--resume", help="Go on from the last checkpoint.", rich_help_panel=o.OUTPUT, show_default=False),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace what is in OUT.", rich_help_panel=o.OUTPUT, show_default=False),
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    device: o.Device = None,
    max_memory: o.MaxMemory = None,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Train MODEL, sparse or not, under the masks that it has, and write the result to OUT: its zeros stay zeros."""
    stage = {
        "data": data, "method": method, "tokens": tokens, "steps": steps, "learning_rate": learning_rate,
        "seqlen": seqlen, "density": density, "num_weights": num_weights, "rank_equivalent": rank_equivalent,
    }  # fmt: skip
    job: dict[str, Any] = {
        "model": model,
        "out": out,
        "recipe": _recipe(
            _with_fields(stage, fields or []),
            {"data": eval_data, "windows": eval_windows},
            {"format": file_format},
            {"seed": seed, "allow_overlap": allow_overlap or None},
            no_eval=no_eval,
        ),
        "machine": build_machine(device, None, max_memory),
        "revision": revision,
        "token": token,
        "trust_remote_code": trust_remote_code,
        "resume": resume,
        "overwrite": overwrite,
    }
    if dry_run:
        show_plan(job, json)
    else:
        run_job(job, typed_command(ctx), json, quiet)


def _recipe(
    stage: dict[str, Any], evaluation: dict[str, Any], export: dict[str, Any], general: dict[str, Any], *, no_eval: bool
) -> Any:
    from ..compress.recipe import EvaluateStage, ExportStage, FinetuneStage, Recipe, build

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    stages = [build(FinetuneStage, **given(stage))]
    if not no_eval:
        stages.append(build(EvaluateStage, **given(evaluation)))
    elif given(evaluation):
        raise RecipeError("--no-eval contradicts --eval and --eval-windows", hint="give one of them")
    stages.append(build(ExportStage, **given(export)))
    return build(Recipe, stages=stages, **given(general))


def _with_fields(stage: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """The stage's options with what --set adds. RecipeError for a field without a value, or given twice."""
    found = dict(stage)
    for text in fields:
        name, sign, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name:
            raise RecipeError(f"--set {text!r} is not understood", hint="write --set FIELD=VALUE")
        if found.get(name) is not None:
            raise RecipeError(f"{name} is given twice", hint=f"leave out --set {name}=...")
        found[name] = value.strip()
    return found
