"""Where the keys of every KV head lie in a ragged cache: arithmetic on positions, for all layers at once.

A layer holds keys and values as two tensors [batch, rows, D]. Each KV head owns a range of rows: first its sinks in
order, then a ring. The token at position p (from 0, counting real tokens of its sequence) lies in row

    p               for p < sink
    sink + (p - sink) mod ring    otherwise

of that range. What a query sees, the sinks and the newest tokens, is then at most two ranges of rows: the sinks with
the part of the ring that has wrapped around, and the rest. So attention over a cache needs no mask.

Rings have room for what the plan keeps at the next length of a coarse grid, and are laid out anew when a sequence grows
beyond it: that costs a copy of the cache every 16 to 32 tokens at first and every 1/64 of the length later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .plan import SLOPES, HeadPlan

GRAIN = 16
FINENESS = 64  # steps of the grid are at most 1/64 of the length


def grid(length: int) -> int:
    """The least grid length that holds `length` tokens: multiples of 16 up to 2048, of 32 up to 4096, and so on."""
    step = GRAIN
    while step * 2 * FINENESS < length:
        step *= 2
    return -(-length // step) * step


@dataclass(frozen=True)
class Rules:
    """The rules of all layers as int64 tensors [layers, 1, KV heads] on one device."""

    sink: Tensor
    alpha: Tensor
    slope: Tensor
    block: int

    @classmethod
    def of(cls, plan: HeadPlan, device: torch.device) -> Rules:
        def gathered(name: str) -> Tensor:
            rows = [[getattr(rule, name) for rule in layer] for layer in plan.heads]
            return torch.tensor(rows, dtype=torch.int64, device=device).unsqueeze(1)

        return cls(gathered("sink"), gathered("alpha"), gathered("slope"), plan.block)

    def kept(self, lengths: Tensor) -> Tensor:
        """`HeadRule.kept` of every head at int64 lengths [batch]: int64 [layers, batch, KV heads]."""
        n = lengths.view(1, -1, 1)
        span = self.alpha + torch.div(self.slope * n, SLOPES, rounding_mode="floor")
        return torch.minimum(n, torch.maximum(span, self.sink + self.block))


@dataclass(frozen=True)
class Layout:
    """Rows of a cache, for sequences of up to `limits` tokens.

    Attributes:
        limits: real tokens that each sequence may reach.
        ring: int64 [layers, batch, KV heads], at least 1.
        first: int64 [layers, KV heads], first row of each head.
        rows: rows of each layer for one sequence.
    """

    rules: Rules
    limits: tuple[int, ...]
    ring: Tensor
    first: Tensor
    rows: tuple[int, ...]

    @classmethod
    def of(cls, rules: Rules, limits: tuple[int, ...]) -> Layout:
        kept = rules.kept(torch.tensor(limits, dtype=torch.int64, device=rules.sink.device))
        rooms = kept.amax(1)
        ends = rooms.cumsum(1)
        return cls(rules, limits, (kept - rules.sink).clamp_(min=1), ends - rooms, tuple(ends[:, -1].tolist()))

    def select(self, indices: Tensor) -> Layout:
        """The layout of the sequences `indices` of a cache, each any number of times."""
        limits = tuple(self.limits[index] for index in indices.tolist())
        return replace(self, limits=limits, ring=self.ring.index_select(1, indices.to(self.ring.device)))

    def holds(self, counts: tuple[int, ...]) -> bool:
        return all(count <= limit for count, limit in zip(counts, self.limits, strict=True))

    def row(self, layer: int, sequence: int, head: int, positions: Tensor) -> Tensor:
        """Rows, counted from the first one of the sequence, of tokens at int64 positions [n] in one layer and head."""
        sink, ring = self.rules.sink[layer, 0, head], self.ring[layer, sequence, head]
        return self.first[layer, head] + _place(positions, sink, ring)


@dataclass(frozen=True)
class Step:
    """One token more of every sequence: where it goes, and what it sees.

    Attributes:
        slots: int64 [batch, KV heads] per layer, rows of the layer's tensors seen as [batch * rows, D].
        ranges: int64 [batch, KV heads, 4] per layer: begin and length of two ranges of those rows.
    """

    slots: tuple[Tensor, ...]
    ranges: tuple[Tensor, ...]

    @classmethod
    def of(cls, layout: Layout, counts: tuple[int, ...], windows: tuple[int, ...]) -> Step:
        """`counts`: tokens so far; `windows`: a further limit of each layer on how far back a query sees."""
        rules, device = layout.rules, layout.ring.device
        position = torch.tensor(counts, dtype=torch.int64, device=device)
        length = position + 1
        kept = rules.kept(length)
        row = torch.arange(len(counts), device=device).view(1, -1, 1)
        rows = torch.tensor(layout.rows, device=device).view(-1, 1, 1)
        base = row * rows + layout.first.unsqueeze(1)
        sink, ring, n = rules.sink, layout.ring, length.view(1, -1, 1)
        slots = base + _place(position.view(1, -1, 1), sink, ring)
        reach = torch.tensor(windows, device=device).view(-1, 1, 1)
        hidden = torch.minimum((n - reach).clamp_(min=0), sink)  # sinks out of reach
        newest = torch.minimum((kept - sink).clamp_(min=0), reach)
        start = torch.where(n > sink, (n - newest - sink) % ring, 0)  # ring row of the oldest one
        wrapped = (start + newest - ring).clamp_(min=0)
        seen = torch.minimum(n, sink)
        joined = seen - hidden + wrapped
        second = base + torch.where(n > sink, sink + start, 0)
        ranges = torch.stack([base + hidden, joined, second, newest - wrapped], -1)
        return cls(slots.unbind(0), ranges.unbind(0))


def _place(position: Tensor, sink: Tensor, ring: Tensor) -> Tensor:
    return torch.where(position < sink, position, sink + (position - sink) % ring)
