"""Memory of one layer of a ragged cache: keys and values [batch, rows, D] as layout.py arranges them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.memory import zeros_apart
from .chunk import Span
from .filled import Rows
from .layout import Layout
from .plan import HeadRule

PIECE = 2048  # tokens moved at a time: what is copied on the way stays small


class Store:
    """What one layer keeps of every sequence.

    Attributes:
        layout: where tokens lie; the keys and values are [batch, layout.rows[layer], D].
        counts: real tokens that each sequence has seen.
    """

    def __init__(self, layer: int, rules: tuple[HeadRule, ...], block: int, layout: Layout, like: Tensor) -> None:
        self.layer, self.rules, self.block = layer, rules, block
        self.counts: tuple[int, ...] = (0,) * like.shape[0]
        self.layout, self.keys, self.values = self._empty(layout, like)
        self.rows: Rows | None = None  # of the keys and values, made where they are needed

    def make_room(self, layout: Layout) -> None:
        """Moves everything to `layout`, which holds it."""
        if layout is self.layout:
            return
        old, (layout, keys, values) = self.alike(None, 0), self._empty(layout, self.keys)
        for rows, _ in old:
            which = torch.tensor(rows, device=keys.device)[:, None]
            for head, rule in enumerate(self.rules):
                kept = kept_positions(rule, self.block, self.counts[rows[0]]).to(keys.device)
                for some in kept.split(PIECE):
                    source = self.layout.row(self.layer, rows[0], head, some)
                    target = layout.row(self.layer, rows[0], head, some)
                    keys[which, target], values[which, target] = self.keys[which, source], self.values[which, source]
        self.layout, self.keys, self.values, self.rows = layout, keys, values, None

    def alike(self, new: Tensor | None, length: int) -> list[tuple[list[int], list[int]]]:
        """Sequences in groups with equal counts and rings and the same real ones of `length` new tokens; and those.

        new: bool [batch, length], which of them are real; None: all.
        """
        groups: dict[Any, tuple[list[int], list[int]]] = {}
        for row, (count, limit) in enumerate(zip(self.counts, self.layout.limits, strict=True)):
            tokens = list(range(length)) if new is None else new[row].nonzero()[:, 0].tolist()
            groups.setdefault((count, limit, tuple(tokens)), ([], tokens))[0].append(row)
        return list(groups.values())

    def span(self, rows: list[int], rule: HeadRule, heads: list[int]) -> Span:
        """What is kept of sequences with equal counts and of heads with one rule, in order."""
        count = self.counts[rows[0]]
        positions = kept_positions(rule, self.block, count).to(self.keys.device)
        places = torch.stack([self.layout.row(self.layer, rows[0], head, positions) for head in heads])
        which = torch.tensor(rows, device=self.keys.device).view(-1, 1, 1)
        return Span(positions, self.keys[which, places], self.values[which, places])

    def write(self, span: Span, rows: list[int], rule: HeadRule, heads: list[int], after: int) -> None:
        """Of a span whose last tokens are new, those new ones that are kept once `after` tokens were seen."""
        kept = kept_positions(rule, self.block, after)
        new = kept[kept >= self.counts[rows[0]]].to(self.keys.device)
        _write(span, new, rows, heads, self.layer, self.layout, self.keys, self.values)

    def select(self, indices: Tensor, layout: Layout) -> None:
        """Only the sequences `indices`, each any number of times; `layout` is the present one, so selected."""
        where = indices.to(self.keys.device)
        self.keys, self.values, self.rows = self.keys.index_select(0, where), self.values.index_select(0, where), None
        self.counts = tuple(self.counts[index] for index in indices.tolist())
        self.layout = layout

    def _empty(self, layout: Layout, like: Tensor) -> tuple[Layout, Tensor, Tensor]:
        shape = (len(layout.limits), layout.rows[self.layer], like.shape[-1])
        if like.is_cpu:
            return layout, zeros_apart(*shape, dtype=like.dtype), zeros_apart(*shape, dtype=like.dtype)
        return layout, like.new_zeros(shape), like.new_zeros(shape)


def kept_positions(rule: HeadRule, block: int, count: int) -> Tensor:
    """int64, rising: positions that a head keeps once it has seen `count` tokens."""
    kept, sinks = rule.kept(count, block), min(rule.sink, count)
    return torch.cat([torch.arange(sinks), torch.arange(count - (kept - sinks), count)])


def _write(
    span: Span, positions: Tensor, rows: list[int], heads: list[int], layer: int, layout: Layout, keys: Tensor,
    values: Tensor,
) -> None:  # fmt: skip
    """Tokens of a span at some of its positions into their places."""
    if not positions.numel():
        return
    index = torch.searchsorted(span.positions, positions)
    which = torch.tensor(rows, device=keys.device)[:, None]
    for i, head in enumerate(heads):
        places = layout.row(layer, rows[0], head, positions)
        keys[which, places] = span.key[:, i, index].detach()
        values[which, places] = span.value[:, i, index].detach()


def by_rule(rules: tuple[HeadRule, ...]) -> list[tuple[HeadRule, list[int]]]:
    """KV heads in groups of one rule."""
    found: dict[HeadRule, list[int]] = {}
    for head, rule in enumerate(rules):
        found.setdefault(rule, []).append(head)
    return list(found.items())


def pick(tensor: Tensor, rows: list[int], heads: list[int], tokens: list[int]) -> Tensor:
    """tensor [batch, heads, tokens, D] at three lists; nothing is copied where a list is everything."""
    for dim, wanted in enumerate((rows, heads, tokens)):
        if len(wanted) != tensor.shape[dim] or wanted != list(range(len(wanted))):
            tensor = tensor.index_select(dim, torch.tensor(wanted, dtype=torch.int64, device=tensor.device))
    return tensor


def put(out: Tensor, rows: list[int], heads: list[int], tokens: list[int], made: Tensor) -> None:
    """The inverse of `pick`: out [batch, heads, tokens, D] at three lists becomes `made`."""
    row, head, token = (torch.tensor(wanted, dtype=torch.int64, device=out.device) for wanted in (rows, heads, tokens))
    out[row[:, None, None], head[None, :, None], token[None, None, :]] = made.to(out.dtype)
