"""gossamer bench: how fast it is on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import KernelError
from . import options as o

EXAMPLES = o.examples(
    "gossamer bench kernels --shapes llama-2-7b --threads 2", "gossamer bench model llama llama-sparse"
)
KERNELS_EXAMPLES = o.examples(
    "gossamer bench kernels",
    "gossamer bench kernels --shapes 4096x4096,tinyllama-1.1b --threads 1 --rounds 100",
    "gossamer bench kernels --tier avx2 --json kernels.json --markdown kernels.md",
)
MODEL_EXAMPLES = o.examples(
    "gossamer bench model llama llama-sparse",
    "gossamer bench model llama llama-50 llama-70 --threads 2 --rounds 5 --json",
)
SHAPES = "llama-3-8b"
ROUNDS = 40

bench = typer.Typer(no_args_is_help=True, epilog=EXAMPLES, rich_markup_mode="rich")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(bench, name="bench", help="Measure speed on this machine.")


@bench.command("kernels", epilog=KERNELS_EXAMPLES)
def kernels(
    shapes: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="OUTxIN and names, comma separated: llama-3-8b, llama-3.2-1b, llama-3.2-3b, llama-2-7b, llama-2-13b, "
            "tinyllama-1.1b, mistral-7b, qwen2-0.5b, qwen2-7b, gemma-2-2b. \\[default: llama-3-8b]",
            show_default=False,
        ),
    ] = SHAPES,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            help=f"Calls of every contender. \\[default: {ROUNDS}]",
            show_default=False,
        ),
    ] = ROUNDS,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the weights: bfloat16 or float16. \\[default: bfloat16]",
            rich_help_panel=o.MACHINE,
            show_default=False,
        ),
    ] = "bfloat16",
    threads: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            help="Threads of every contender. \\[default: torch's own]",
            rich_help_panel=o.MACHINE,
            show_default=False,
        ),
    ] = None,
    tier: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="Compiled code for avx512bf16, avx512, avx2 or scalar. \\[default: the fastest here]",
            rich_help_panel=o.MACHINE,
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        Optional[Path],
        typer.Option("--json", metavar="FILE", help="Write all figures.", rich_help_panel=o.OUTPUT, show_default=False),
    ] = None,
    markdown: Annotated[
        Optional[Path],
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Write the tables; into a page that exists, between its two marks.",
            rich_help_panel=o.OUTPUT,
            show_default=False,
        ),
    ] = None,
    quiet: o.Quiet = False,
) -> None:
    """Time every kernel against the fastest dense product, shape by shape, with all weights in memory, not in caches.

    One row of x. Each result is checked before it is timed: a wrong one has no speed, and the command ends with 1.
    Times are best deciles of interleaved rounds; speedups refer to the fastest of torch in bfloat16, with and without
    oneDNN, torch in float16 and Gossamer's own dense kernel.
    """
    from ..compress.bench import bench_kernels
    from .console import show_lines, watch

    with watch(quiet) as progress:
        result = bench_kernels(
            shapes, rounds=rounds, dtype=dtype, threads=threads, tier=tier,
            json=json, markdown=markdown, progress=progress,
        )  # fmt: skip
    show_lines(result.text.splitlines())
    if result.wrong:
        raise KernelError("; ".join(result.wrong), hint="report this, with the output of `gossamer env`")


@bench.command("model", epilog=MODEL_EXAMPLES)
def model(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Hub ids or local model folders.", show_default=False)
    ],
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of the prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=4, help="Tokens to generate in every round.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Generations of every contender.")] = 3,
    threads: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            min=1,
            help="Threads of every contender. \\[default: torch's own]",
            rich_help_panel=o.MACHINE,
            show_default=False,
        ),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Time greedy decoding of models, in turns, with one loop, prompt and number of threads.

    A model with masks runs in our runtime; any other one in transformers (bfloat16, the same without oneDNN, float16)
    and in our runtime. Each is checked before it is timed: a wrong one has no speed, and the command ends with 1.
    """
    from .console import hush_libraries, show_json, show_lines, watch

    hush_libraries()
    import torch

    from ..compress.benchmodel import bench_models, markdown

    if threads is not None:
        torch.set_num_threads(threads)
    with watch(quiet) as progress:
        report = bench_models(
            models, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds, progress=progress
        )
    if json:
        show_json(report)
    else:
        show_lines(markdown(report).splitlines())
    if report["wrong"]:
        raise KernelError("wrong results: " + ", ".join(report["wrong"]), hint="report this, with `gossamer env`")
