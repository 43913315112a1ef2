"""gossamer finetune: train a model under its masks; none of its zeros is lost."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from . import options as o
from . import trained as t
from .failure import typed_command
from .job import run_job, show_plan
from .recipes import build_machine, finished, given

EXAMPLES = o.examples(
    "gossamer finetune llama-sparse -o llama-recovered --data train.txt",
    "gossamer finetune OUT -o OUT2 --method full --data instructions.jsonl --tokens 5000000 --learning-rate 1e-4",
    "gossamer finetune OUT -o OUT2 --method bias-norm --data train.txt --eval test.txt --set batch=16",
    "gossamer finetune MODEL -o OUT2 --method spiel-ag --rank-equivalent 8 --data train.txt",
    "gossamer finetune MODEL -o OUT2 --method lora --data train.txt --base-quant nf4 --set precision=bfloat16",
    "gossamer finetune OUT -o OUT2 --data train.txt --teacher MODEL --set loss=distill",
    "accelerate launch --num_processes 4 -m gossamer finetune OUT -o OUT2 --data train.txt",
    "gossamer finetune OUT -o OUT2 --data train.txt --resume",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("finetune", epilog=EXAMPLES)(finetune)


def finetune(
    ctx: typer.Context,
    model: o.Model,
    out: o.Out,
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
            "plain low-rank updates, on dense models. pst: prunes to --set sparsity or pattern by a learned score. "
            "dst: everything, and masks move under their budget. \\[default: masklora]",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    tokens: t.Tokens = None,
    steps: t.Steps = None,
    learning_rate: Annotated[
        Optional[float],
        typer.Option(
            metavar="RATE",
            help="The highest one. \\[default: the method's own]",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    fields: t.Fields = None,
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
    base_quant: Annotated[
        Optional[str],
        typer.Option(
            metavar="nf4|fp4|int8",
            help="Hold the weights below an adapter in 4 or 8 bits (bitsandbytes): less memory, lossy.",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODEL",
            help="The dense model that --set loss=distill (or mix) learns from.",
            rich_help_panel=o.TRAINING,
            show_default=False,
        ),
    ] = None,
    seqlen: o.SequenceLength = None,
    eval_data: o.Evaluation = None,
    no_eval: o.NoEvaluation = False,
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
    file_format: o.FileFormat = None,
    dry_run: o.DryRun = False,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    device: o.Device = None,
    max_memory: o.MaxMemory = None,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Train MODEL, sparse or not, under the masks that it has, and write the result to OUT: its zeros stay zeros."""
    from ..compress.recipe import FinetuneStage, build

    options = {
        "data": data, "method": method, "tokens": tokens, "steps": steps, "learning_rate": learning_rate,
        "seqlen": seqlen, "density": density, "num_weights": num_weights, "rank_equivalent": rank_equivalent,
        "base_quant": base_quant, "teacher": teacher,
    }  # fmt: skip
    stage = build(FinetuneStage, **t.with_fields(given(options), fields))
    job: dict[str, Any] = {
        "model": model, "out": out,
        "recipe": finished(
            [stage], {"data": eval_data, "windows": eval_windows}, {"format": file_format},
            {"seed": seed, "allow_overlap": allow_overlap or None}, no_eval=no_eval,
        ),
        "machine": build_machine(device, None, max_memory), "revision": revision, "token": token,
        "trust_remote_code": trust_remote_code, "resume": resume, "overwrite": overwrite,
    }  # fmt: skip
    if dry_run:
        show_plan(job, json)
    else:
        run_job(job, typed_command(ctx), json, quiet)
