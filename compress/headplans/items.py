"""Calibration sequences: token ids, and which of them the loss counts.

Plain text gives windows in which every token counts. Conversations (records with `messages`, or with `prompt` and
`response`; instructions.py) go through the chat template, and only the responses count: what matters is which
keys the answer needs (MoA's ablation: retrieval 0.25 with the loss on all tokens, 0.87 on answers, 0.95 on the model's
own answers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import DataError
from ...finetune.losses import IGNORED
from ..instructions import Example

LONG_ENOUGH = 0.75  # of the length: a shorter conversation is joined with others


@dataclass(frozen=True)
class Item:
    """ids: int64 [n]. counted: bool [n], True where predicting that token counts; never the first."""

    ids: Tensor
    counted: Tensor

    @property
    def answer(self) -> int:
        """Where the last run of counted tokens begins."""
        rest = (~self.counted).nonzero().flatten()
        last = int(self.counted.nonzero().flatten()[-1])
        before = rest[rest < last]
        return int(before[-1]) + 1 if len(before) else 0


def text_item(ids: Tensor) -> Item:
    """A window of plain text."""
    counted = torch.ones(len(ids), dtype=torch.bool)
    counted[0] = False
    return Item(ids, counted)


def example_item(example: Example) -> Item | None:
    """A conversation as the chat template writes it; None where nothing would count."""
    counted = torch.tensor(example.labels) != IGNORED
    counted[:1] = False
    return Item(torch.tensor(example.ids), counted) if counted.any() else None


def trim(item: Item, length: int) -> Item:
    """At most `length` tokens: at most half of them the last answer's, the rest the start and the end of what is before
    it in equal parts."""
    size = len(item.ids)
    if size <= length:
        return item
    start = item.answer
    answer = min(size - start, max(length // 2, length - start))
    room = length - answer
    head = room // 2
    index = [*range(head), *range(start - (room - head), start), *range(start, start + answer)]
    counted = item.counted[index].clone()
    counted[0] = False
    return Item(item.ids[index], counted)


def items_of_length(items: Sequence[Item], length: int, count: int, name: str) -> list[Item]:
    """Up to `count` sequences of about `length` tokens: long conversations trimmed, short ones joined.

    DataError when all of them together do not fill one.
    """
    found = [trim(item, length) for item in items if len(item.ids) >= LONG_ENOUGH * length][:count]
    ids: list[Tensor] = []
    counted: list[Tensor] = []
    size = 0
    for item in items:
        if len(found) == count:
            break
        if len(item.ids) >= LONG_ENOUGH * length:
            continue
        ids.append(item.ids)
        counted.append(item.counted)
        size += len(item.ids)
        if size >= length:
            joined = Item(torch.cat(ids)[:length], torch.cat(counted)[:length])
            if joined.counted.any():
                found.append(joined)
            ids, counted, size = [], [], 0
    if not found:
        raise DataError(
            f"{name} holds {sum(len(item.ids) for item in items)} tokens, one sequence needs {length}",
            hint="give more text, or name shorter --lengths",
        )
    return found
