"""gossamer eval: the perplexity of one model, with its protocol."""

from __future__ import annotations

import typer

from . import options as o

EXAMPLES = o.examples(
    "gossamer eval demo-sparse --data demo-model/heldout.txt",
    "gossamer eval meta-llama/Llama-3.2-1B --data wikitext2 --json",
    "gossamer eval MODEL --data reviews.jsonl --seqlen 1024 --windows 100",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eval", epilog=EXAMPLES)(evaluate)


def evaluate(
    model: o.Model,
    data: o.Data = "wikitext2",
    seqlen: o.SequenceLength = None,
    windows: o.Windows = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    max_memory: o.MaxMemory = None,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Measure the perplexity of MODEL, dense or sparse, block by block from disk."""
    from .console import hush_libraries, show_json, show_lines, watch

    hush_libraries(quiet)
    from ..compress import distributed
    from ..compress.recipe import EvaluateStage, build
    from ..compress.score import evaluate_model
    from .recipes import build_machine

    stage = build(EvaluateStage, data=data, seqlen=seqlen, windows=windows)
    machine = build_machine(device, dtype, max_memory)
    with watch(quiet) as progress:
        result = evaluate_model(
            model, stage, machine,
            revision=revision, token=token, trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    if not distributed.is_main():
        return
    if json:
        show_json(result)
    else:
        show_lines(_lines(result))


def _lines(result: dict) -> list[str]:
    from ..compress.report import describe_protocol, human_bytes

    return [
        f"perplexity {result['perplexity']:.4f}",
        f"cross-entropy {result['cross_entropy']:.4f} nats per token, standard error {result['standard_error']:.4f}",
        f"protocol: {describe_protocol(result['protocol'])}",
        *([f"run by its head plan: {result['head_plan']}"] if "head_plan" in result else []),
        *_left_out(result),
        f"peak memory {human_bytes(result['peak_memory_bytes'])}",
    ]


def _left_out(result: dict) -> list[str]:
    if "policy_left_out" not in result:
        return []
    command = f"gossamer inspect {result['model']} --activation --data DATA"
    return [f"without its activation policy ({result['policy_left_out']}), which skips at decode; with it: {command}"]
