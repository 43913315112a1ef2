"""A decoder block under an activation policy: its matrices as the policy's reference semantics say, and what was read.

Tokens before `start` are dense, as a prompt is; all later ones are sparse. Core neurons are chosen for every sequence
from its dense tokens, without the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...activation_sparsity.base import CoreGuide, CoreNeurons, GateThreshold, LinearPolicy, Policy
from ...activation_sparsity.cores import nearest_cluster, stable_core
from ...activation_sparsity.reference import active, centered, gate_active, neurons_only
from ..blocks import Prunable, StreamedModel
from ..prunable import owner_of


@dataclass
class Reads:
    """Weights read by sparse tokens, of those there are: exact sums over tokens, per matrix."""

    read: dict[str, int] = field(default_factory=dict)
    whole: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, read: int, whole: int) -> None:
        """So many weights were read where a dense model reads `whole`."""
        self.read[name] = self.read.get(name, 0) + read
        self.whole[name] = self.whole.get(name, 0) + whole

    def update(self, other: Reads) -> None:
        """Add the sums of `other`."""
        for name in other.whole:
            self.add(name, other.read[name], other.whole[name])

    @property
    def sparsity(self) -> float:
        """Share of the weights that was skipped, over all tokens and matrices."""
        whole = sum(self.whole.values())
        return 1.0 - sum(self.read.values()) / whole if whole else 0.0

    def by_matrix(self) -> dict[str, float]:
        """The same for every matrix."""
        return {name: 1.0 - self.read[name] / self.whole[name] for name in self.whole}


@dataclass
class Sequences:
    """State of the sequences that run together: the cluster of each, where a policy is guided by similarity."""

    clusters: Sequence[int] | None = None


@contextmanager
def applied(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    policy: Policy,
    start: int,
    reads: Reads | None = None,
    sequences: Sequences | None = None,
) -> Iterator[None]:
    """Inside, `block` (of `model`, number `index`) runs under `policy`, tokens from `start` on; `reads` is added to."""
    path = model.block_names[index]
    prunables = {p.name: p for p in model.prunables(index)}
    whole = [p for p in prunables.values() if p.kind == "expert"]  # no policy has them: read by every token
    rows = _Rows(start)
    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(rows.watch(whole, reads), with_kwargs=True).remove)
        covered: set[str] = set()
        for name, entry in policy.mlps.items():
            if entry.parts.down in prunables:
                covered |= {entry.parts.up, entry.parts.down, entry.parts.gate or entry.parts.up}
                hooks = _NeuronHooks(entry, policy.guide, rows, reads, sequences or Sequences(), name, prunables)
                hooks.attach(stack, block, path)
        for name, prunable in prunables.items():
            if name in covered:
                continue
            module = owner_of(block, path, prunable)
            if prunable.kind == "expert":
                continue
            linear = policy.linears.get(name)
            if linear is None:
                stack.callback(module.register_forward_hook(_count_dense(prunable, rows, reads)).remove)
                continue
            hooks_of_map = _LinearHooks(prunable, linear, rows, reads)
            stack.callback(module.register_forward_pre_hook(hooks_of_map.before).remove)
            stack.callback(module.register_forward_hook(hooks_of_map.after).remove)
        yield


class _Rows:
    """Which rows of a matrix's input are whose: some models flatten [windows, tokens, in] to [windows * tokens, in]."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.shape: tuple[int, ...] = ()

    def watch(self, whole: Sequence[Prunable], reads: Reads | None) -> Callable[..., None]:
        """A hook before the block that sees its input's shape; counts `whole` as read by every sparse token."""

        def hook(_: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            self.shape = tuple((args[0] if args else named["hidden_states"]).shape[:2])
            windows, length = self.shape
            if reads is None:
                return
            for prunable in whole:
                every = windows * (length - self.start) * prunable.size
                reads.add(prunable.name, every, every)

        return hook

    def split(self, x: Tensor) -> Tensor:
        """[windows, tokens, in]; as it is where the rows are not those of the block's input."""
        windows, length = self.shape
        return x.view(windows, length, -1) if x.dim() == 2 and len(x) == windows * length else x

    def sparse(self, x: Tensor) -> Tensor:
        """The rows of sparse tokens: [windows, tokens - start, in]."""
        return self.split(x)[..., self.start :, :]


def _count_dense(prunable: Prunable, rows: _Rows, reads: Reads | None) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
        if reads is not None and args:
            every = rows.sparse(args[0]).shape[:-1].numel() * prunable.size
            reads.add(prunable.name, every, every)

    return hook


class _LinearHooks:
    """A map whose sparse tokens skip inputs: the map itself multiplies what is left of them, together with the prompt.

    What `sparse_linear` computes, except that a bias of the map's own is added before rounding.
    """

    def __init__(self, prunable: Prunable, policy: LinearPolicy, rows: _Rows, reads: Reads | None) -> None:
        self.prunable, self.policy, self.rows, self.reads = prunable, policy, rows, reads
        self.dropped: Tensor | None = None

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        policy, (out, width) = self.policy, self.prunable.shape
        x, none = self.rows.split(args[0]), args[0].new_zeros(())
        inputs = centered(x[..., self.rows.start :, :], policy)
        mask = active(inputs, policy.threshold)
        if self.reads is not None:
            tokens, channels = mask.shape[:-1].numel(), int(mask.count_nonzero())
            read = channels * out + tokens * policy.rank * (out + width)
            self.reads.add(self.prunable.name, read, tokens * self.prunable.size)
        self.dropped = None if policy.left is None else torch.where(mask, none, inputs).float()
        kept = torch.cat([x[..., : self.rows.start, :], torch.where(mask, inputs, none)], dim=-2)
        return (kept.view(args[0].shape), *args[1:])

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        policy = self.policy
        sparse = self.rows.split(output)[..., self.rows.start :, :]
        if self.dropped is not None and policy.left is not None and policy.right is not None:
            sparse += F.linear(F.linear(self.dropped, policy.right), policy.left).to(sparse.dtype)
            self.dropped = None
        if policy.shift is not None:
            sparse += policy.shift.to(sparse.dtype)
        return output


class _NeuronHooks:
    """An MLP that computes some of its neurons for sparse tokens."""

    def __init__(
        self,
        entry: GateThreshold | CoreNeurons,
        guide: CoreGuide | None,
        rows: _Rows,
        reads: Reads | None,
        sequences: Sequences,
        name: str,
        prunables: Mapping[str, Prunable],
    ) -> None:
        self.entry, self.guide, self.rows, self.reads = entry, guide, rows, reads
        self.sequences, self.name, self.prunables = sequences, name, prunables
        self.mask: Tensor | None = None

    def attach(self, stack: ExitStack, block: nn.Module, path: str) -> None:
        """Register the hooks; `stack` removes them."""
        parts = self.entry.parts
        if isinstance(self.entry, GateThreshold):
            assert parts.gate is not None
            gate = owner_of(block, path, self.prunables[parts.gate])
            stack.callback(gate.register_forward_hook(self._gate).remove)
        down = owner_of(block, path, self.prunables[parts.down])
        stack.callback(down.register_forward_pre_hook(self._down).remove)

    def _gate(self, _: nn.Module, __: object, output: Tensor) -> None:
        assert isinstance(self.entry, GateThreshold)
        gate = output.chunk(2, dim=-1)[0] if self.entry.parts.fused else output
        self.mask = gate_active(self.rows.sparse(gate), self.entry)

    def _down(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inner, start = self.rows.split(args[0]), self.rows.start
        if isinstance(self.entry, CoreNeurons):
            mask = self._core(inner)
        else:
            assert self.mask is not None
            mask = self.mask
        self._count(mask)
        mixed = torch.cat([inner[..., :start, :], neurons_only(inner[..., start:, :], mask)], dim=-2)
        return (mixed.view(args[0].shape), *args[1:])

    def _core(self, inner: Tensor) -> Tensor:
        assert isinstance(self.entry, CoreNeurons)
        assert self.guide is not None
        start, each = self.rows.start, inner.reshape(-1, *inner.shape[-2:])
        mask = torch.zeros(len(each), each.shape[1] - start, each.shape[2], dtype=torch.bool, device=inner.device)
        for number, sequence in enumerate(each):
            if self.sequences.clusters is not None:
                assert self.entry.clusters is not None
                core = self.entry.clusters[self.sequences.clusters[number]]
            elif start > 1:
                core = stable_core(sequence[1:start], self.entry, self.guide.alpha)
            else:  # nobody votes: all neurons, as at decode
                core = torch.arange(each.shape[2], device=inner.device)
            mask[number][:, core.long()] = True
        return mask.view(*inner.shape[:-2], -1, inner.shape[-1])

    def _count(self, mask: Tensor) -> None:
        if self.reads is None:
            return
        parts, neurons, tokens = self.entry.parts, int(mask.sum()), mask.shape[:-1].numel()
        gate = parts.gate or parts.up
        for name in dict.fromkeys((gate, parts.up, parts.down)):
            prunable = self.prunables[name]
            each = prunable.size // parts.neurons  # weights per neuron in this matrix
            whole = tokens * prunable.size
            read = neurons * each
            if isinstance(self.entry, GateThreshold) and name == gate:
                read = (whole + read) // 2 if parts.fused else whole
            self.reads.add(name, read, whole)


def cluster_of(inner: Tensor, policy: Policy, start: int) -> int:
    """The cluster of one sequence from inner [tokens, neurons] of the MLP that gives its signature."""
    assert policy.guide is not None
    assert policy.guide.signature is not None
    entry = policy.mlps[policy.guide.signature]
    assert isinstance(entry, CoreNeurons)
    return nearest_cluster(inner[1:start], entry, policy.guide)
