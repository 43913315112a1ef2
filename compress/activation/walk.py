"""Windows through a model under an activation policy: losses of sparse tokens, and how much they read.

Protocol: the first quarter of every window is the prompt, dense; every later position is sparse, keys and values of the
prompt stay dense. Scored are the predictions made at sparse positions: tokens start + 1 to the end of the window.
Perplexity = exp(mean cross-entropy of these).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...activation_sparsity.base import Policy
from ...errors import DataError
from .. import distributed
from ..blocks import BlockArgs, Prunable, StreamedModel
from ..evaluate import Score, capture, summarise
from ..hidden import HiddenStore
from ..progress import Progress
from ..timing import Clock
from .apply import Reads, Sequences, applied, cluster_of
from .batches import Batches

PROMPT = 0.25


@dataclass(frozen=True)
class SparseScore:
    """`losses`: mean cross-entropy of the sparse positions of every window, in the order of the windows."""

    losses: list[float]
    reads: Reads = field(repr=False)

    @property
    def score(self) -> Score:
        """Perplexity with its standard error."""
        return summarise(self.losses)


class Walk:
    """A model's windows, captured once; every `run` goes through all blocks anew.

    With `resident`, blocks are loaded once and kept: for many runs of a model that fits in memory.
    """

    def __init__(
        self,
        model: StreamedModel,
        windows: Tensor,
        *,
        memory_bytes: int,
        scratch: Path,
        prompt: float = PROMPT,
        resident: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.windows, self.progress = model, windows, progress or Progress()
        self.start = prompt_length(windows.shape[1], prompt)
        self.resident = resident
        self._blocks: dict[int, nn.Module] = {}
        self._bytes, self._scratch = memory_bytes // 2, scratch
        self._embedded = HiddenStore(scratch / f"embedded-{distributed.rank()}", memory_bytes // 2)
        self.args: BlockArgs = capture(model, windows, self._embedded)
        self._batches = Batches(model, self.args, len(windows))
        self._stores = 0

    def close(self) -> None:
        """Free what is held."""
        self._embedded.close()
        self._blocks.clear()

    def block(self, index: int) -> nn.Module:
        """Block `index` with its weights."""
        if index in self._blocks:
            return self._blocks[index]
        block = self.model.load_block(index)
        if self.resident:
            self._blocks[index] = block
        return block

    def share_blocks(self, other: Walk) -> None:
        """Use the blocks that another walk of the same model holds."""
        self._blocks = other._blocks

    def embedded(self) -> HiddenStore:
        """The first block's inputs of all followed windows, in a store of their own; close it."""
        return self.copied(self._embedded, self._bytes)

    def copied(self, hidden: HiddenStore, memory_bytes: int) -> HiddenStore:
        """A copy of all followed windows' hidden states; close it."""
        self._stores += 1
        copy = HiddenStore(self._scratch / f"walk-{self._stores}-{distributed.rank()}", memory_bytes)
        for window in distributed.followed(len(self.windows)):
            copy.put(window, hidden.get(window))
        return copy

    def reads(self, policy: Policy) -> Reads:
        """What sparse tokens read under `policy`, all windows together."""
        found = Reads()
        with self.final(policy, reads=found):
            pass
        return _all_reads(found)

    def all_reads(self, reads: Reads) -> Reads:
        """The sums over all ranks."""
        return _all_reads(reads)

    def run(
        self,
        policy: Policy | None,
        label: str = "",
        *,
        reads: bool = True,
        start: tuple[int, HiddenStore | None] = (0, None),
        before: Callable[[int, HiddenStore], None] | None = None,
    ) -> SparseScore:
        """Losses under `policy`; None: the dense model on the same positions. `start`, `before`: as in `final`."""
        found = Reads()
        losses: dict[int, float] = {}
        with self.final(policy, label, found if reads else None, start, before) as hidden, self.model.outer():
            for window in distributed.my_share(len(self.windows)):
                logits = self.model.logits(hidden.get(window), self.args, window)
                losses[window] = _loss(logits, self.windows[window], self.start)
        return SparseScore(_in_order(losses, len(self.windows)), _all_reads(found))

    @contextmanager
    def final(
        self,
        policy: Policy | None,
        label: str = "",
        reads: Reads | None = None,
        start: tuple[int, HiddenStore | None] = (0, None),
        before: Callable[[int, HiddenStore], None] | None = None,
    ) -> Iterator[HiddenStore]:
        """Hidden states after the last block.

        `start`: the first block to run, and its inputs (None: the embedded windows). `before` sees the inputs of every
        block that runs.
        """
        first, inputs = start
        hidden = self.copied(inputs or self._embedded, self._bytes)
        try:
            clusters = self.clusters(policy) if policy is not None else None
            clock = Clock(self.model.num_blocks - first)
            for index in range(first, self.model.num_blocks):
                if before is not None:
                    before(index, hidden)
                self.advance(index, self.block(index), hidden, policy, reads, clusters)
                if label:
                    _, left = clock.tick()
                    self.progress.windows(label, index + 1, self.model.num_blocks, left, "blocks")
            yield hidden
        finally:
            hidden.close()

    def clusters(self, policy: Policy) -> dict[int, int] | None:
        """Cluster of every followed window, by its dense prompt; None where no token of it votes."""
        if policy.guide is None or policy.guide.signature is None or self.start < 2:
            return None
        down = policy.mlps[policy.guide.signature].parts.down
        found: dict[int, int] = {}
        hidden = self.embedded()
        try:
            for index in range(self.model.num_blocks):
                block = self.block(index)
                own = [p for p in self.model.prunables(index) if p.name == down]
                for window in distributed.followed(len(self.windows)):
                    seen: list[Tensor] = []
                    watch = self.model.observe(block, own, partial(_note, seen)) if own else None
                    with watch or nullcontext():
                        x = self.model.run_block(index, block, hidden.get(window), self.args, window)
                    hidden.put(window, x)
                    if seen:
                        found[window] = cluster_of(seen[0], policy, self.start)
                if own:
                    return found
        finally:
            hidden.close()
        return found

    def advance(
        self,
        index: int,
        block: nn.Module,
        hidden: HiddenStore,
        policy: Policy | None,
        reads: Reads | None = None,
        clusters: dict[int, int] | None = None,
    ) -> None:
        """Hidden states of all followed windows one block further. Windows of another rank are not counted."""
        mine = set(distributed.my_share(len(self.windows)))
        for group in self._batches.of(index, block, hidden):
            counted = reads if set(group) <= mine else None
            x = torch.cat([hidden.get(window) for window in group])
            sequences = Sequences([clusters[window] for window in group] if clusters is not None else None)
            with (
                applied(self.model, index, block, policy, self.start, counted, sequences)
                if policy is not None
                else nullcontext()
            ):
                y = self.model.run_block(index, block, x, self.args, group[0])
            for window, row in zip(group, y, strict=True):
                hidden.put(window, row[None])


def _note(seen: list[Tensor], _: Prunable, x: Tensor) -> None:
    seen.append(x.clone())


def prompt_length(length: int, prompt: float) -> int:
    """Dense tokens of a window: at least one, the first of the sequence. DataError when nothing is left to score."""
    start = max(1, int(length * prompt))
    if start > length - 2:
        raise DataError(
            f"windows of {length} tokens leave nothing to score after a prompt of {start}", hint="use a longer --seqlen"
        )
    return start


def _loss(logits: Tensor, ids: Tensor, start: int) -> float:
    targets = ids[start + 1 :].to(logits.device)
    return float(torch.nn.functional.cross_entropy(logits[start:-1], targets))


def _in_order(losses: dict[int, float], windows: int) -> list[float]:
    if distributed.world() == 1:
        return [losses[window] for window in range(windows)]
    shares = distributed.gather(list(losses.values()))
    order = [window for rank in range(distributed.world()) for window in range(rank, windows, distributed.world())]
    by_window = dict(zip(order, shares, strict=True))
    return [by_window[window] for window in range(windows)]


def _all_reads(reads: Reads) -> Reads:
    """The sums over all ranks."""
    if distributed.world() == 1:
        return reads
    total = Reads()
    for name in sorted(reads.whole):
        read, whole = (int(sum(distributed.gather([float(v)]))) for v in (reads.read[name], reads.whole[name]))
        total.add(name, read, whole)
    return total


def increase(sparse: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """(relative increase of perplexity, its standard error), paired per window: exp(mean difference) - 1."""
    gaps = [a - b for a, b in zip(sparse, dense, strict=True)]
    mean = math.fsum(gaps) / len(gaps)
    spread = math.fsum((gap - mean) ** 2 for gap in gaps)
    error = math.sqrt(spread / (len(gaps) - 1) / len(gaps)) if len(gaps) > 1 else math.nan
    return math.expm1(mean), math.exp(mean) * error
