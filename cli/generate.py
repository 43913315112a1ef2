"""gossamer generate: text from a model, with tokens per second and memory."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from . import options as o

EXAMPLES = o.examples(
    'gossamer generate demo-sparse --prompt "The module defines"',
    'gossamer generate llama-sparse --prompt "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9',
    'gossamer generate llama-sparse --prompt "Once upon a time" --max-new-tokens 64 --threads 2 --json',
)
SAMPLING = "Sampling"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("generate", epilog=EXAMPLES)(generate)


def generate(
    model: o.Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Stop after so many tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    temperature: Annotated[
        float, typer.Option(help="0: always the most likely token.", rich_help_panel=SAMPLING)
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(metavar="N", help="Draw from the N most likely tokens. 0: from all.", rich_help_panel=SAMPLING),
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most likely tokens of this total.", rich_help_panel=SAMPLING)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", rich_help_panel=SAMPLING)] = 0,
    prefill: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="Long inputs see one expanded layer at a time (streamed), or keep what was expanded (cached).",
            rich_help_panel=o.MACHINE,
        ),
    ] = "streamed",
    unpacked: Annotated[
        bool, typer.Option("--unpacked", help="Run sparse matrices as dense ones.", rich_help_panel=o.MACHINE)
    ] = False,
    threads: Annotated[
        Optional[int],
        typer.Option(
            metavar="N", min=1, help="\\[default: torch's choice]", rich_help_panel=o.MACHINE, show_default=False
        ),
    ] = None,
    dtype: o.Dtype = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Write what follows a prompt, token by token. Figures go to stderr."""
    from .console import hush_libraries, show_json

    hush_libraries()
    import torch

    from ..compress.completion import Request, complete
    from ..compress.generate import Sampling

    if threads is not None:
        torch.set_num_threads(threads)
    request = Request(prompt, max_new_tokens, chat, Sampling(temperature, top_k, top_p, seed))
    made = complete(
        model, request, (lambda piece: None) if json else _show,
        dtype=dtype or "auto", prefill=prefill, packed=not unpacked,
        revision=revision, token=token, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if json:
        show_json(made.to_json())
        return
    typer.echo()
    if not quiet:
        typer.echo(_figures(made), err=True)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _figures(made: object) -> str:
    from ..compress.completion import Completion
    from ..compress.report import human_bytes

    assert isinstance(made, Completion)
    dense = f", {len(made.dense_matrices)} faster dense" if made.dense_matrices else ""
    return "\n".join(
        [
            f"{made.tokens_per_second:.1f} tokens/s over {made.new_tokens} tokens, {made.threads} threads; "
            f"first token after {made.first_token_seconds:.2f} s ({made.prompt_tokens} in the prompt)",
            f"loaded in {made.load_seconds:.1f} s, {made.repack_seconds:.1f} s of it packing; "
            f"{made.sparse_matrices} packed matrices{dense}",
            f"memory {human_bytes(made.loaded_bytes)}, at most {human_bytes(made.peak_bytes)} while generating",
        ]
    )
