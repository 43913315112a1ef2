"""A text for calibration or evaluation, as read: what the readers hand to the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import DataError

Role = Literal["calibration", "evaluation"]

SEPARATOR = "\n\n"
_COLUMNS = ("text", "messages", "prompt and response", "prompt and completion")


@dataclass(frozen=True)
class TextData:
    """One text and how it was put together.

    `name`: what the user sees beside a perplexity (file, or dataset with config and split). `protocol`: how the text
    was assembled. `documents`: instead of `text`, where the protocol samples documents one by one (C4 calibration);
    they may stay on disk. `window_limit`: at most so many evaluation windows, where the protocol says so. `digest`:
    sha256 of the text, or of the documents one after the other.
    """

    text: str
    name: str
    protocol: str
    documents: Sequence[str] | None = field(default=None, repr=False, compare=False)
    window_limit: int | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if self.documents is None and not self.text.strip():
            raise DataError(f"{self.name} holds no text", hint="give a file with text in it")
        digest = hashlib.sha256()
        for part in [self.text] if self.documents is None else self.documents:
            digest.update(part.encode("utf-8", "surrogatepass"))
        object.__setattr__(self, "digest", digest.hexdigest())


def record_text(record: Mapping[str, Any], where: str, column: str | None = None) -> str:
    """The text of one JSONL, Parquet or dataset row. DataError names the fields found when none of them is known."""
    if column is not None:
        if column not in record:
            raise DataError(f"{where} has no column {column!r}", hint=f"its columns are {_names(record)}")
        return _plain(record[column], where, column)
    if "text" in record:
        return _plain(record["text"], where, "text")
    if "messages" in record:
        return _plain(record["messages"], where, "messages")
    if "prompt" in record and "response" in record:
        return "\n".join(_plain(record[key], where, key) for key in ("prompt", "response"))
    if "prompt" in record and "completion" in record:
        between = "" if isinstance(record["completion"], str) else "\n"
        return between.join(_plain(record[key], where, key) for key in ("prompt", "completion"))
    raise DataError(
        f"{where} has none of the fields {', '.join(_COLUMNS)}; it has {_names(record)}",
        hint="rename the field that holds the text to `text`",
    )


def join_documents(documents: Iterable[str], separator: str = SEPARATOR) -> str:
    """Non-empty documents joined by `separator`."""
    return separator.join(document for document in documents if document)


def _plain(value: Any, where: str, field_name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return "\n".join(_message(item, where, field_name) for item in value)
    raise DataError(f"{where}: field {field_name!r} holds {type(value).__name__}, not text")


def _message(item: Any, where: str, field_name: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping) and isinstance(item.get("content"), str):
        return str(item["content"])
    raise DataError(f"{where}: an entry of {field_name!r} has no text under `content`")


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, record))) or "none"
