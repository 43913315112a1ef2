"""Calibration sequences: token ids, and which of them the loss counts.

Plain text gives windows in which every token counts. Conversations (records with `messages`, or with `prompt` and
`response`) go through the tokenizer's chat template, and only what the assistant says counts: what matters is which
keys the answer needs (MoA's ablation: retrieval 0.25 with the loss on all tokens, 0.87 on answers, 0.95 on the model's
own answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError

Messages = Sequence[Mapping[str, str]]
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


def messages_of(record: Mapping[str, Any]) -> Messages | None:
    """The conversation that a JSONL, Parquet or dataset row holds; None for one of another kind."""
    messages = record.get("messages")
    if isinstance(messages, Sequence) and not isinstance(messages, str) and messages:
        whole = all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)
        return messages if whole and any(m["role"] == "assistant" for m in messages) else None
    if isinstance(record.get("prompt"), str) and isinstance(record.get("response"), str):
        user, assistant = record["prompt"], record["response"]
        return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return None


def conversation_item(tokenizer: Any, messages: Messages) -> Item | None:
    """A conversation as the model sees it; None where the assistant says nothing.

    The assistant's tokens are found by rendering the conversation up to each of its turns, which needs no mark in the
    template. A template that renders an earlier turn differently later on counts the last turn only; so does a
    tokenizer that does not say where its tokens lie, by their number.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    messages = list(messages[: last + 1])
    if not getattr(tokenizer, "chat_template", None):
        return _plain_item(tokenizer, messages)
    render = lambda part, prompt: tokenizer.apply_chat_template(part, add_generation_prompt=prompt, tokenize=False)
    whole = render(messages, False)
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:i], True), render(messages[: i + 1], False)
            if whole.startswith(before) and whole.startswith(after):
                turns.append((len(before), len(after)))
    ids, counted = _tokens_in(tokenizer, whole, turns)
    if not any(counted):
        said = len(tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"])
        counted = [place >= len(ids) - said for place in range(len(ids))]
    counted[0] = False
    return Item(torch.tensor(ids), torch.tensor(counted)) if any(counted) else None


def _tokens_in(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Token ids of a rendered conversation, and which of them reach into one of the spans of characters."""
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, [False] * len(ids)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(a < end and b > start for start, end in spans) for a, b in coded["offset_mapping"]]
    return coded["input_ids"], inside


def _plain_item(tokenizer: Any, messages: Messages) -> Item | None:
    """Without a template: contents one below the other."""
    ids: list[int] = []
    counted: list[bool] = []
    for i, message in enumerate(messages):
        text = message["content"] + ("\n" if i + 1 < len(messages) else "")
        part = tokenizer(text, add_special_tokens=i == 0)["input_ids"]
        ids += part
        counted += [message["role"] == "assistant" and bool(i)] * len(part)
    item = Item(torch.tensor(ids, dtype=torch.int64), torch.tensor(counted, dtype=torch.bool))
    return item if any(counted) else None


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
