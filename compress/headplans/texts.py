"""The texts of a head plan: what influence is measured on at every length, and what is held out to choose by."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import DataError
from ..data import calibration_windows, evaluation_windows, token_ids
from ..instructions import example_of, is_instruction
from ..text import Texts, TextSource
from ..textdata import SEPARATOR, Role, TextData, join_documents
from ..traindata import records_of
from .items import Item, example_item, items_of_length, text_item

HELD_OUT = 0.1  # of the calibration text, where no other validation text is given
MOST_DOCUMENTS = 2000
MOST_RECORDS = 10_000


@dataclass(frozen=True)
class HeadTexts:
    """`items`: by length. `validation`: longer sequences that no item shares a token's place with."""

    items: Mapping[int, Sequence[Item]] = field(repr=False)
    validation: Sequence[Item] = field(repr=False)
    calibration: TextSource
    validated: TextSource
    answers: str


def head_texts(
    texts: Texts,
    data: str,
    validation: str | None,
    lengths: Sequence[int],
    beyond: int,
    nsamples: int,
    held: int,
    seed: int,
) -> HeadTexts:
    """Sequences of every length from `data`, and `held` of `beyond` tokens from `validation` or from the end of `data`.

    DataError for what cannot be read or is too short.
    """
    mine, source, said = _all_items(texts, data, "calibration")
    if validation is not None:
        others, validated, _ = _all_items(texts, validation, "evaluation")
    if isinstance(mine, list):
        random.Random(seed).shuffle(mine)
        cut = len(mine) if validation is not None else max(len(mine) - max(round(HELD_OUT * len(mine)), 1), 1)
        items = {n: items_of_length(mine[:cut], n, nsamples, source.dataset) for n in lengths}
    else:
        keep = len(mine) if validation is not None else len(mine) - _held_tokens(len(mine), beyond, held)
        items = {
            n: [text_item(w) for w in calibration_windows(mine[:keep], nsamples, n, seed, source.dataset)]
            for n in lengths
        }
        cut = keep
    if validation is None:
        others, validated = mine[cut:], source
    if isinstance(others, list):
        chosen = items_of_length(others, beyond, held, validated.dataset)
    else:
        chosen = [text_item(w) for w in evaluation_windows(others, beyond, held, validated.dataset)]
    every = [item.ids for many in (*items.values(), chosen) for item in many]
    texts.check_vocabulary(torch.cat(every))
    texts.calibrated(source, torch.cat(every))
    return HeadTexts(items, chosen, source, validated, said)


def _held_tokens(tokens: int, beyond: int, held: int) -> int:
    """Tokens at the end that are not calibrated on: a tenth, at least one sequence, at most what all of them need."""
    return min(max(int(tokens * HELD_OUT), beyond), beyond * held)


def _all_items(texts: Texts, data: str, role: Role) -> tuple[Any, TextSource, str]:
    """(conversations as items, or the ids [n] of running text; what is known of the text; what counts)."""
    name, records = _conversations(data)
    if records is None:
        text = texts.text(data, role)
        if text.documents is not None:
            text = _joined(text)
        return token_ids(texts.tokenizer, text), TextSource(text.name, text.protocol, text.digest), "every token"
    found: list[Item] = []
    digest = hashlib.sha256()
    for record, where in records:
        if not is_instruction(record):
            raise DataError(f"{where} is no conversation, those before it are", hint="give a file of one kind")
        item = example_item(example_of(record, where, texts.tokenizer))
        if item is not None:
            found.append(item)
            digest.update(item.ids.numpy().tobytes())
    if not found:
        raise DataError(f"{name} holds no conversation in which the assistant says something")
    return found, TextSource(name, f"{len(found)} conversations", digest.hexdigest()), "the assistant's tokens"


def _conversations(data: str) -> tuple[str, Iterable[tuple[Any, str]] | None]:
    """(name, the first records and where they are) of a file or dataset of conversations; None for running text."""
    found = records_of(data)
    if found is None:
        return data, None
    name, records = found
    chosen = itertools.islice(records, MOST_RECORDS)
    first = next(chosen, None)
    if first is None or not is_instruction(first[0]):
        return name, None
    return name, itertools.chain([first], chosen)


def _joined(text: TextData) -> TextData:
    assert text.documents is not None
    documents = [text.documents[i] for i in range(min(len(text.documents), MOST_DOCUMENTS))]
    return TextData(
        join_documents(documents, SEPARATOR), text.name, f"first {len(documents)} documents joined by an empty line"
    )
