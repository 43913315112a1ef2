"""Perplexity and KL to the dense model, streamed block by block like calibration.

Protocol (GPTQ, SparseGPT, Wanda): the text is tokenised in one go and cut into non-overlapping windows of `seqlen`
tokens, the tail dropped; the model predicts tokens 2..seqlen of every window; perplexity = exp(mean token
cross-entropy). The protocol travels with every figure.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from . import distributed, memory
from .attachments import entries
from .blocks import BlockArgs, StreamedModel
from .failpoint import failpoint
from .hidden import HiddenStore
from .progress import BlockDone, Progress
from .timing import Clock


@dataclass(frozen=True)
class Protocol:
    """Everything that must be equal before two perplexities may be compared. `text`: how it was put together."""

    dataset: str
    text: str
    seqlen: int
    windows: int
    predicted_tokens: int
    stride: int
    bos: str
    dtype: str
    method: str = "non-overlapping windows (GPTQ/SparseGPT/Wanda)"


@dataclass(frozen=True)
class Score:
    """Perplexity with the standard error of the mean cross-entropy over windows (nats).

    `head_plan`: what the model ran by, if anything.
    """

    perplexity: float
    cross_entropy: float
    standard_error: float
    head_plan: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Its fields; without the head plan where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "head_plan" or value is not None}


@dataclass(frozen=True)
class Comparison:
    """A model beside the dense one on the same windows. `kl`: mean KL(dense || model) per token in nats."""

    before: Score
    after: Score
    kl: float


def score(
    model: StreamedModel, windows: Tensor, *, memory_bytes: int, progress: Progress, label: str, scratch: Path | None
) -> Score:
    """Perplexity of one model over windows [n, length]; hidden states beyond `memory_bytes` spill below `scratch`.

    A model whose config has a head plan runs by it, as `gossamer.load` would run it.
    """
    plan = run_by_plan(model, entries(model.config).get("heads"))
    with _final_states(model, windows, memory_bytes, progress, label, scratch) as (hidden, args), model.outer():
        losses = [
            _cross_entropy(model.logits(hidden.get(w), args, w), windows[w])
            for w in _reported(distributed.my_share(len(windows)), f"{label}, output", progress)
        ]
    return replace(summarise(distributed.gather(losses)), head_plan=plan)


def run_by_plan(model: StreamedModel, entry: dict[str, Any] | None) -> str | None:
    """Lets `model` run by the head plan in `entry`, with masks, from now on; the plan in a few words. None: no plan.

    CheckpointError or ModelError for a plan that is malformed or of another model.
    """
    if entry is None:
        return None
    from ..attention.plan import HeadPlan
    from .heads import apply

    plan = HeadPlan.from_json(entry)
    apply(model.whole, plan, cache="masked")
    kept = ", ".join(f"{plan.density(length):.4g} at {length} tokens" for length in plan.lengths)
    return f"{plan.made.get('method', 'head plan')}, density {kept}"


def compare(
    dense: StreamedModel,
    model: StreamedModel,
    windows: Tensor,
    *,
    memory_bytes: int,
    progress: Progress,
    scratch: Path | None,
    same_head: bool,
) -> Comparison:
    """Perplexity of both models and the KL divergence between them, token by token, over windows [n, length].

    `same_head`: everything outside the blocks is equal in both models, and is loaded once.
    """
    half = memory_bytes // 2
    rows: list[tuple[float, float, float]] = []
    with (
        _final_states(dense, windows, half, progress, "evaluate before", scratch) as (dense_hidden, dense_args),
        _final_states(model, windows, half, progress, "evaluate after", scratch) as (hidden, args),
    ):
        head = dense if same_head else model
        with dense.outer(), head.outer():
            for w in _reported(distributed.my_share(len(windows)), "evaluate output", progress):
                reference = dense.logits(dense_hidden.get(w), dense_args, w)
                before = _cross_entropy(reference, windows[w])
                reference = reference.log_softmax(-1)
                logits = head.logits(hidden.get(w), args, w)
                after = _cross_entropy(logits, windows[w])
                rows.append((before, after, _kl(reference, logits.log_softmax(-1))))
    columns = [distributed.gather([row[k] for row in rows]) for k in range(3)]
    return Comparison(summarise(columns[0]), summarise(columns[1]), _mean(columns[2]))


def _reported(windows: Sequence[int], label: str, progress: Progress) -> Iterator[int]:
    """The windows one by one; each is reported when the next is asked for."""
    clock = Clock(len(windows))
    for done, window in enumerate(windows, 1):
        yield window
        _, left = clock.tick()
        progress.windows(label, done, len(windows), left)


@contextmanager
def _final_states(
    model: StreamedModel, windows: Tensor, memory_bytes: int, progress: Progress, label: str, scratch: Path | None
) -> Iterator[tuple[HiddenStore, BlockArgs]]:
    """Hidden states after the last block, for this rank's windows."""
    with tempfile.TemporaryDirectory(prefix="evaluate-", dir=scratch) as folder:
        hidden = HiddenStore(Path(folder) / "hidden", memory_bytes)
        try:
            args = capture(model, windows, hidden)
            clock = Clock(model.num_blocks)
            progress.stage(label, model.num_blocks)
            for index in range(model.num_blocks):
                block = model.load_block(index)
                propagate(model, index, block, hidden, args, len(windows))
                del block
                memory.release()
                seconds, left = clock.tick()
                progress.block(
                    BlockDone(label, index, model.num_blocks, model.block_names[index], None, None, seconds, left)
                )
                failpoint("evaluate")
            yield hidden, args
        finally:
            hidden.close()


def capture(model: StreamedModel, windows: Tensor, hidden: HiddenStore) -> BlockArgs:
    """Embed the windows that this rank follows into `hidden` and record the arguments of every block."""
    mine = distributed.followed(len(windows))
    with distributed.agreed():
        with model.outer():
            args = model.capture(windows, hidden.put, indices=mine)
        for window in mine:
            if not bool(torch.isfinite(hidden.get(window)).all()):
                raise ModelError(
                    "the embeddings hold NaN or infinite values", hint="the checkpoint is damaged; download it again"
                )
    return args


def propagate(
    model: StreamedModel,
    index: int,
    block: torch.nn.Module,
    hidden: HiddenStore,
    args: BlockArgs,
    windows: int,
    passed: Container[int] = (),
) -> None:
    """Replace the hidden state of every window that this rank follows by the block's output, but for those `passed`."""
    with distributed.agreed():
        for window in distributed.followed(windows):
            if window in passed:
                continue
            hidden.put(window, model.run_block(index, block, hidden.get(window), args, window))


def _cross_entropy(logits: Tensor, ids: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:].to(logits.device)))


def _kl(reference: Tensor, log_probabilities: Tensor) -> float:
    """Mean over tokens of sum_v p log(p / q), from log p and log q [tokens, vocabulary]."""
    total = torch.nn.functional.kl_div(log_probabilities[:-1], reference[:-1], log_target=True, reduction="sum")
    return float(total) / (reference.shape[0] - 1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def summarise(losses: Sequence[float]) -> Score:
    mean = _mean(losses)
    spread = math.fsum((loss - mean) ** 2 for loss in losses)
    error = math.sqrt(spread / (len(losses) - 1) / len(losses)) if len(losses) > 1 else math.nan
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Score(perplexity, mean, error)
