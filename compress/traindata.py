"""Training text as token rows: plain text, documents, or instructions of which only the response is learned.

What is held out is decided by a hash of the content alone: neither the seed nor the order of the file changes it, and
two runs on one file agree. Plain text is split by rows, records (JSONL, Parquet, datasets) as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..finetune.losses import IGNORED
from ..finetune.tokens import TokenRows
from .data import load_text, token_ids
from .instructions import Example, example_of, is_instruction
from .textdata import record_text
from .textfile import read_records

MIN_ROWS = 2


@dataclass(frozen=True)
class TrainingText:
    """Rows to train on and rows that are held out. `protocol`: how they were made; `digest`: sha256 of all of them."""

    train: TokenRows = field(repr=False)
    heldout: TokenRows = field(repr=False)
    name: str
    protocol: str
    digest: str


def load_training(
    spec: str, tokenizer: Any, length: int, *, heldout: float = 0.1, limit: int | None = None
) -> TrainingText:
    """The text that `spec` names (as in `data.load_text`), in rows of `length` tokens.

    `heldout`: share of the content held out. `limit`: no more tokens than about this many are read, where the text
    comes in documents. DataError for an empty text, or one too short for a row to train on and one to hold out.
    """
    records = records_of(spec)
    if records is not None:
        name, found = records
        return _from_records(name, found, tokenizer, length, heldout, limit)
    text = load_text(spec, "calibration")
    if text.documents is not None:
        return _from_records(text.name, ((d, "") for d in text.documents), tokenizer, length, heldout, limit)
    rows = _cut(token_ids(tokenizer, text).tolist(), length)
    held = torch.tensor([_held(row.numpy().tobytes(), heldout) for row in rows], dtype=torch.bool)
    return _made(
        TokenRows(rows[~held], name=text.name), TokenRows(rows[held], name=text.name),
        text.name, f"{text.protocol}, cut into rows of {length} tokens", heldout,
    )  # fmt: skip


def instruction_rows(spec: str, tokenizer: Any, length: int, limit: int | None) -> TokenRows | None:
    """Rows of `length` tokens in which only responses are labels, at most `limit`; None for other text."""
    records = records_of(spec)
    first = None if records is None else next(iter(records[1]), None)
    if first is None or not is_instruction(first[0]):
        return None
    text = load_training(spec, tokenizer, length, heldout=0.0, limit=None if limit is None else limit * length)
    return _take(text.train, slice(0, limit))


def records_of(spec: str) -> tuple[str, Iterable[tuple[object, str]]] | None:
    """(name, (record, where it is)) of a source that comes in records; None for running text."""
    path = Path(spec).expanduser()
    if spec and path.exists():
        found = read_records(path)
        return None if found is None else (path.name, found)
    from .hubdata import SHORT_NAMES, hub_records
    from .textfile import looks_like_path

    if not spec or looks_like_path(spec) or spec in SHORT_NAMES:
        return None
    return hub_records(spec)


def _from_records(
    name: str, records: Iterable[tuple[object, str]], tokenizer: Any, length: int, heldout: float, limit: int | None
) -> TrainingText:
    parts: dict[bool, list[Example]] = {False: [], True: []}
    instructed, seen, cut = False, 0, 0
    for record, where in records:
        example = _example(record, where, tokenizer)
        if not example.ids:
            continue
        instructed = instructed or is_instruction(record)
        cut += len(example.ids) > length
        parts[_held(_identity(record), heldout)].append(example)
        seen += len(example.ids)
        if limit is not None and seen * (1 - heldout) >= limit + length:
            break
    lost = 0
    if not instructed:
        train, held = (TokenRows(_cut([t for e in parts[k] for t in e.ids], length), name=name) for k in (False, True))
        said = f"documents one after another, each ended by a special token, cut into rows of {length} tokens"
    else:
        pad = _pad(tokenizer)
        train, held = (pack(parts[k], length, pad, name) for k in (False, True))
        said = f"examples packed into rows of {length} tokens, only responses learned"
        if cut:
            said += f"; {cut} longer ones cut"
        lost = sum(not _learned(example, length) for part in parts.values() for example in part)
        if lost:
            said += f"; {lost} left out, whose prompt fills a row"
    return _made(train, held, name, said, heldout, lost)


def _example(record: object, where: str, tokenizer: Any) -> Example:
    if is_instruction(record):
        return example_of(record, where, tokenizer)  # type: ignore[arg-type]
    text = record if isinstance(record, str) else record_text(record, where) if isinstance(record, Mapping) else None
    if text is None:
        raise DataError(f"{where} is {type(record).__name__}, not an object with a `text` field")
    if not text.strip():
        return Example([], [])
    ids = list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    return Example(ids, list(ids))


def pack(examples: Sequence[Example], length: int, pad: int, name: str = "the training text") -> TokenRows:
    """Examples in their order, as many into a row as fit; one that is longer than a row loses its end.

    Each starts at position 0 again, so that the model keeps it apart from its neighbours, and its first token is no
    label. What is left of a row is filled with `pad`, which is no label either.
    """
    rows: list[list[Example]] = []
    room = 0
    for example in examples:
        kept = Example(example.ids[:length], example.labels[:length])
        if not _learned(example, length):
            continue
        if len(kept.ids) > room:
            rows.append([])
            room = length
        rows[-1].append(kept)
        room -= len(kept.ids)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    for row, members in enumerate(rows):
        at = 0
        for member in members:
            size = len(member.ids)
            ids[row, at : at + size] = torch.tensor(member.ids)
            labels[row, at + 1 : at + size] = torch.tensor(member.labels[1:], dtype=torch.int64)
            positions[row, at : at + size] = torch.arange(size)
            at += size
        positions[row, at:] = torch.arange(length - at)
    return TokenRows(ids, labels, positions, name)


def _learned(example: Example, length: int) -> bool:
    """Whether something to learn is left of an example that is cut to a row."""
    return any(label != IGNORED for label in example.labels[1:length])


def _cut(ids: list[int], length: int) -> Tensor:
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def _held(content: bytes, share: float) -> bool:
    """A pure function of the content."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") < share * 2**64


def _identity(record: object) -> bytes:
    if isinstance(record, Mapping):
        return "\x1f".join(f"{key}={record[key]!r}" for key in sorted(record, key=str)).encode("utf-8", "surrogatepass")
    return str(record).encode("utf-8", "surrogatepass")


def _pad(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def _made(train: TokenRows, held: TokenRows, name: str, protocol: str, share: float, lost: int = 0) -> TrainingText:
    if share and len(held) == 0 and len(train) >= MIN_ROWS:  # a short text: its last row
        train, held = _take(train, slice(0, -1)), _take(train, slice(-1, None))
    count = len(train) + len(held)
    if len(train) == 0 and len(held) >= MIN_ROWS:
        raise DataError(
            f"{name} is held out as a whole: heldout {share:g} of {count} rows", hint="use a smaller heldout"
        )
    if len(train) == 0 or (share and len(held) == 0):
        hint = "give more text, or a smaller --seqlen; at least two rows are needed, one of them is held out"
        if lost:
            hint = f"the prompts of {lost} examples fill a row and leave no response to learn: use a larger --seqlen"
        raise DataError(f"{name} is too short to train on: {count} rows of {train.length} tokens", hint=hint)
    digest = hashlib.sha256((train.digest() + held.digest()).encode()).hexdigest()
    said = f"{protocol}; {len(train)} rows to train on, {len(held)} held out by a hash of their content"
    return TrainingText(train, held, name, said, digest)


def _take(rows: TokenRows, which: slice) -> TokenRows:
    part = lambda tensor: None if tensor is None else tensor[which]  # noqa: E731
    return TokenRows(rows.ids[which], part(rows.labels), part(rows.positions), rows.name)
