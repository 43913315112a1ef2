"""A retrieval probe that needs no download: lines of numbered values, and a question about one of them.

Perplexity hides what a plan forgets (MoA's uniform plan: perplexity 4.89 against 3.96, retrieval 0.25 against 0.98):
plans are compared on this as well, at depths spread evenly over the context. It counts towards the choice only where
the dense model can do it.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from .items import Item

DIGITS = 4


def probe_items(tokenizer: Any, length: int, count: int, seed: int) -> list[Item]:
    """Up to `count` sequences of at most `length` tokens; only the answer counts. Empty where no two lines fit."""
    draw = random.Random(seed)
    per_line = max(len(_ids(tokenizer, _line(draw), False)), 1)
    question = len(_ids(tokenizer, _line(draw), True)) + 4
    lines = (length - question) // per_line
    found: list[Item] = []
    while lines >= 2 and len(found) < count:
        keys = draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), lines)
        values = [draw.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in keys]
        place = min(int((len(found) + 0.5) * lines / count), lines - 1)
        text = "".join(f"The value of {k} is {v}.\n" for k, v in zip(keys, values, strict=True))
        before = _ids(tokenizer, f"{text}The value of {keys[place]} is", True)
        answer = _ids(tokenizer, f" {values[place]}", False)
        if len(before) + len(answer) > length:
            lines -= 1
            continue
        ids = torch.tensor([*before, *answer], dtype=torch.int64)
        found.append(Item(ids, torch.arange(len(ids)) >= len(before)))
    return found


def _line(draw: random.Random) -> str:
    return f"The value of {draw.randrange(1000, 9999)} is {draw.randrange(1000, 9999)}.\n"


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
