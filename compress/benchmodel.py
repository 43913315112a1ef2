"""Decode speed of models on this machine: dense ones in every way that torch offers, and in ours, beside sparse ones.

All contenders take turns of a few tokens in one process, with the same loop (generate.py), the same prompt and the same
threads, so that a machine whose memory changes its pace, for seconds or minutes, treats them alike. A contender whose
numbers are wrong has no speed.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..kernels.modules.counting import counting
from .activation.report import realised
from .benchcheck import TOLERANCE, relative_error
from .environment import processor_name
from .generate import Timing, generate
from .load import load
from .progress import Progress
from .report import human_bytes

COUNTED_TOKENS = 17
# Tokens of a turn: a third of a second of a billion weights. The first two are not counted: the prompt and the step
# that finds out which layers belong together; later in the text, what others have left in the caches.
TURN = 8


@dataclass
class Contender:
    """One way to run a model. `skipped`: share of each map that an activation policy did not read while decoding."""

    name: str
    folder: str
    model: Any
    setting: Callable[[], AbstractContextManager[object]] = nullcontext
    sparse: bool = False
    error: float = 0.0
    skipped: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return self.error <= TOLERANCE


def bench_models(
    folders: Sequence[str],
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    rounds: int = 3,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Milliseconds per token of every model in every way, as plain data: one row per contender.

    A folder with sparse weights or an activation policy runs in our runtime; any other one in transformers (bfloat16,
    bfloat16 without oneDNN, float16) and in our runtime. Ratios are to the fastest and to the first dense contender.
    """
    told = progress or Progress()
    contenders = [contender for folder in folders for contender in _contenders(folder, told)]
    vocabulary = min(contender.model.config.vocab_size for contender in contenders)
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    for contender in contenders:
        told.working(f"checking {contender.name}")
        contender.error = _error(contender, ids)
        contender.skipped = _skipped(contender.model, ids)
    order = random.Random(0)
    running = [contender for contender in contenders if contender.right]
    for number in range(rounds):
        told.working(f"round {number + 1}/{rounds}")
        for contender, timing in _in_turns(running, ids, new_tokens, order):
            contender.first.append(timing.first_token_seconds)
            contender.steps += [seconds for i, seconds in enumerate(timing.steps) if i % TURN > 1]
    return {
        "machine": {
            "processor": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        },
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "contenders": _rows(contenders),
        "wrong": [contender.name for contender in contenders if not contender.right],
    }  # fmt: skip


def _in_turns(
    contenders: Sequence[Contender], ids: Tensor, new_tokens: int, order: random.Random
) -> list[tuple[Contender, Timing]]:
    """One text from every contender, TURN tokens at a time, each time in another order."""
    timings = [Timing() for _ in contenders]
    texts = [
        generate(one.model, ids, new_tokens, timing=timing) for one, timing in zip(contenders, timings, strict=True)
    ]
    for _ in range(0, new_tokens, TURN):
        for i in order.sample(range(len(texts)), len(texts)):
            with contenders[i].setting():
                for _ in islice(texts[i], TURN):
                    pass
    return list(zip(contenders, timings, strict=True))


def _contenders(folder: str, progress: Progress) -> Iterator[Contender]:
    progress.working(f"loading {folder}")
    model = load(folder)
    skips = hasattr(model, "gossamer_activation")
    if (model.gossamer_masks or skips) and model.dtype is torch.float32:  # 16-bit weights, as the dense ones
        model = load(folder, dtype=torch.bfloat16)
    if model.gossamer_masks or skips:
        kinds = ["sparse"] * bool(model.gossamer_masks) + ["skipping"] * skips
        yield Contender(f"ours, {', '.join(kinds)}{_attached(model)}", folder, model, sparse=True)
        return
    ours = model if model.dtype is torch.bfloat16 else load(folder, dtype=torch.bfloat16)
    read: Any = AutoModelForCausalLM.from_pretrained
    plain = read(folder, dtype=torch.bfloat16).eval()
    half = read(folder, dtype=torch.float16).eval()
    yield Contender("transformers bfloat16", folder, plain)
    yield Contender("transformers bfloat16, no oneDNN", folder, plain, _no_onednn)
    yield Contender("transformers float16", folder, half)
    yield Contender(f"ours, dense{_attached(ours)}", folder, ours)


def _attached(model: Any) -> str:
    return ", head plan" if getattr(model, "gossamer_heads", None) is not None else ""


def markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; greedy, "
        f"{report['new_tokens']} tokens after {report['prompt_tokens']}, best decile (and median) of "
        f"{report['rounds']} rounds.",
        "",
        "| model | ms per token | tokens/s | first token | weights | read per token | GB/s | over best dense | over "
        "first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, report["contenders"])]) + "\n"


def _line(row: dict[str, Any]) -> str:
    name = f"{row['name']} ({Path(row['model']).name})"
    if row["decile_ms"] is None:
        return f"| {name} | wrong result: relative error {row['relative_error']:.2g} | | | | | | | |"
    ratios = [f"{row[key]:.2f}x" if row[key] is not None else "" for key in ("over_best_dense", "over_first_dense")]
    cells = [
        name,
        f"{row['decile_ms']:.1f} ({row['median_ms']:.1f})",
        f"{1e3 / row['decile_ms']:.1f}",
        f"{row['first_token_ms']:.0f} ms",
        human_bytes(row["weight_bytes"]),
        human_bytes(row["bytes_per_token"]),
        f"{row['gb_per_s']:.1f}",
        *ratios,
    ]
    return "| " + " | ".join(cells) + " |"


@contextmanager
def _no_onednn() -> Iterator[None]:
    before = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(*before)


def _error(contender: Contender, ids: Tensor) -> float:
    return relative_error(contender.model, contender.setting, ids)


def _rows(contenders: list[Contender]) -> list[dict[str, Any]]:
    rows = [_row(contender) for contender in contenders]
    dense = [row["decile_ms"] for row, one in zip(rows, contenders, strict=True) if not one.sparse and one.right]
    for row in rows:
        if row["decile_ms"] is not None and dense:
            row["over_best_dense"] = min(dense) / row["decile_ms"]
            row["over_first_dense"] = dense[0] / row["decile_ms"]
    return rows


def _row(contender: Contender) -> dict[str, Any]:
    ordered = sorted(contender.steps)
    read = _bytes_per_token(contender.model, contender.skipped)
    row: dict[str, Any] = {
        "name": contender.name,
        "model": contender.folder,
        "sparse": contender.sparse,
        "relative_error": contender.error,
        "activation_sparsity": contender.skipped.get("", None),
        "weight_bytes": _weight_bytes(contender.model),
        "bytes_per_token": read,
        "decile_ms": None,
        "median_ms": None,
        "first_token_ms": None,
        "gb_per_s": None,
        "over_best_dense": None,
        "over_first_dense": None,
    }
    if contender.right and ordered:
        decile = ordered[len(ordered) // 10]
        row |= {
            "decile_ms": decile * 1e3,
            "median_ms": statistics.median(ordered) * 1e3,
            "first_token_ms": min(contender.first) * 1e3,
            "gb_per_s": read / decile / 1e9,
        }
    return row


def _weight_bytes(model: Any) -> int:
    """Parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _skipped(model: Any, ids: Tensor) -> dict[str, float]:
    """By map, and under "" of all maps: what the kernels counted while a few tokens were decoded."""
    if not hasattr(model, "gossamer_activation"):
        return {}
    with counting() as counted:
        for _ in generate(model, ids, COUNTED_TOKENS):
            pass
    found = realised(model, counted)
    return found["layers"] | {"": found["skipped"]}


def _bytes_per_token(model: Any, skipped: dict[str, float]) -> int:
    """Weights of all layers but the embedding tables, of which a step reads one row; experts as if all were chosen."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        total += round(sum(tensor.nbytes for tensor in own) * (1 - skipped.get(name, 0.0)))
    return total
