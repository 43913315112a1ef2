"""gossamer inspect: what is in a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from ..errors import RecipeError
from . import options as o

EXAMPLES = o.examples(
    "gossamer inspect demo-sparse",
    "gossamer inspect meta-llama/Llama-3.2-1B --json",
    "gossamer inspect demo-sparse --activation --data heldout.txt",
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("inspect", epilog=EXAMPLES)(inspect)


def inspect(
    model: o.Model,
    activation: Annotated[
        bool,
        typer.Option(
            "--activation",
            help="What its activations allow instead: CETT per layer, PPL-1% and PPL-5% sparsity, and what the "
            "policy in the checkpoint skips.",
            rich_help_panel=o.ACTIVATION,
            show_default=False,
        ),
    ] = False,
    data: Annotated[
        Optional[str],
        typer.Option(
            metavar="DATA",
            help="Text for --activation. \\[default: wikitext2]",
            rich_help_panel=o.ACTIVATION,
            show_default=False,
        ),
    ] = None,
    seqlen: o.SequenceLength = None,
    windows: o.Windows = None,
    json: o.Json = False,
    revision: o.Revision = None,
    token: o.Token = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Show layers, sparsity, patterns, masks and bytes of MODEL. No weight is changed."""
    if activation:
        origin = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        _show_activation(model, data, seqlen, windows, json, origin)
        return
    if data is not None or seqlen is not None or windows is not None:
        raise RecipeError("--data, --seqlen and --windows belong to --activation", hint="add --activation")
    from ..compress.inspect import inspect_model
    from .console import show_json, show_lines, show_table

    found = inspect_model(model, revision=revision, token=token, trust_remote_code=trust_remote_code)
    if json:
        show_json(found)
        return
    header = ("tensor", "shape", "dtype", "sparsity", "pattern", "mask", "dense", "stored")
    show_table(str(model), header, [_row(row) for row in found["layers"]])
    show_lines(_totals(found))


def _show_activation(
    model: str, data: str | None, seqlen: int | None, windows: int | None, as_json: bool, origin: dict[str, Any]
) -> None:
    from ..compress.activation.inspect import inspect_activation
    from ..compress.stage_recipes.evaluate import DEFAULT_EVALUATION
    from .console import show_json, show_lines, show_table

    text, count = data or DEFAULT_EVALUATION, 16 if windows is None else windows
    found = inspect_activation(model, text, seqlen=seqlen, windows=count, **origin)
    if as_json:
        show_json(found)
        return
    header = ("MLP", *(f"CETT at {share:.0%}" for share in found["table"]))
    rows = [(layer["name"], *(f"{cett:.3f}" for cett in layer["table"])) for layer in found["layers"]]
    show_table(str(model), header, rows)
    lines = [f"perplexity {found['perplexity']:.4f}: {found['protocol']['method']}"]
    for limit, ppl in found["ppl"].items():
        lines.append(
            f"PPL-{limit} sparsity: {ppl['sparsity']:.1%} of the neurons (CETT {ppl['cett']:.3f}, perplexity "
            f"{ppl['increase']:+.2%})"
        )
    if "policy" in found:
        policy = found["policy"]
        lines.append(
            f"policy {policy['method']}: {policy['sparsity']:.1%} of the linear weights skipped, perplexity "
            f"{policy['perplexity']:.4f} ({policy['increase']:+.2%} ± {policy['standard_error']:.2%})"
        )
        lines += [f"  {name}: {share:.1%}" for name, share in policy["matrices"].items()]
    show_lines(lines)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    from ..compress.report import human_bytes, percent

    return (
        row["key"],
        "x".join(map(str, row["shape"])),
        row["dtype"] if row["values"] is None else f"{row['dtype']} ({row['values']})",
        percent(row["sparsity"]),
        row["pattern"] or "-",
        _mask(row),
        human_bytes(row["dense_bytes"]),
        human_bytes(row["stored_bytes"]),
    )


def _mask(row: dict[str, Any]) -> str:
    if row["pattern"] is None:
        return "none"
    return "broken pattern" if row["holds_pattern"] is False else "explicit"


def _totals(found: dict[str, Any]) -> list[str]:
    from ..compress.report import human_bytes, percent

    size, sparsity = found["bytes"], found["sparsity"]
    counts = f"{found['parameters']:,} parameters, {found['prunable_parameters']:,} of them prunable"
    lines = [
        f"{counts}; {found['masks']} masks",
        f"sparsity: {percent(sparsity['prunable'])} of prunable, {percent(sparsity['all'])} of all parameters",
        f"bytes: {human_bytes(size['dense'])} dense, {human_bytes(size['stored'])} stored (ratio {size['ratio']:.3f})",
    ]
    if (policy := found["activation"]) is not None:
        what = f"{policy['maps']} matrices, {policy['mlps']} MLPs"
        told = policy["facts"].get("calibrated")
        lines.append(
            f"activation policy {policy['method']}: {what}" + ("" if told is None else f", skips {percent(told)}")
        )
    if (plan := found["heads"]) is not None:
        shares = ", ".join(f"{percent(share)} at {length}" for length, share in plan["density"].items())
        lines.append(f"head plan {plan['method']}: KV bytes {shares} tokens")
    return lines + ([f"note: {found['note']}"] if found["note"] else [])
