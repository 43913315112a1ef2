"""Datasets from the hub: the short names with the papers' own protocol, and any id with config, split and column.

Protocols of the GPTQ, SparseGPT and Wanda papers: wikitext2 (test rows joined by two newlines; training rows joined by
a space), ptb (joined by a space), c4 (calibration: one random window from each of the drawn training documents longer
than a window; evaluation: the first 1100 validation documents joined by a space, at most 256 windows).
"""

from __future__ import annotations

import importlib.util
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .textdata import SEPARATOR, Role, TextData, join_documents, record_text

C4_EVALUATION_DOCUMENTS = 1100
C4_EVALUATION_WINDOWS = 256
MAX_CHARACTERS = 100_000_000

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_C4_SHARDS = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_PTB_FILE = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{split}/0000.parquet"
_SPLITS: dict[Role, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation")}
_TIMEOUT_S = 10


@dataclass(frozen=True)
class DatasetSpec:
    """`id[:config][:split][:column]`; empty parts take the default."""

    id: str
    config: str | None
    split: str | None
    column: str | None

    @classmethod
    def parse(cls, text: str) -> DatasetSpec:
        """Raises DataError for more than four parts or an id that no hub has."""
        name, *rest = text.split(":")
        if "://" in text or len(rest) > 3 or _ID.fullmatch(name) is None:
            raise DataError(
                f"{text!r} is neither a file nor a dataset id",
                hint="a dataset is written id[:config][:split][:column], for instance wikitext:wikitext-2-raw-v1:test",
            )
        config, split, column = [part or None for part in rest] + [None] * (3 - len(rest))
        return cls(name, config, split, column)


def load_hub_text(spec: str, role: Role) -> TextData:
    """Load a short name or a dataset id. DataError when `datasets`, the hub or the dataset is not there."""
    short = _SHORT.get(spec)
    parsed = None if short else DatasetSpec.parse(spec)
    _require(spec, role)
    if short:
        return short(role)
    assert parsed is not None
    return _any_dataset(parsed, role)


def hub_records(spec: str) -> tuple[str, Iterator[tuple[object, str]]]:
    """(name, (row, where it is)) of the training rows of a dataset id, streamed. DataError as `load_hub_text`."""
    parsed = DatasetSpec.parse(spec)
    _require(spec, "calibration")
    name, rows = _stream(parsed, "calibration")
    column = parsed.column
    chosen = (row if column is None else {"text": record_text(row, name, column)} for row in rows)
    return name, ((row, f"{name} row {number}") for number, row in enumerate(chosen, start=1))


def _require(spec: str, role: Role) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{spec} is not a file here, and reading it as a dataset needs the package `datasets`",
            hint=f"pip install 'gossamer[train]', or give a text, JSONL or Parquet file with {_option(role)}",
        )
    _require_hub(spec, role)


def _require_hub(spec: str, role: Role) -> None:
    """One quick question instead of minutes of retries; with HF_HUB_OFFLINE the local cache is asked directly."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # it answers; the hub client has certificates of its own
        raise _unreachable(spec, role, str(reason)) from error


def _unreachable(spec: str, role: Role, reason: str) -> DataError:
    return DataError(
        f"{role} text {spec!r} is not a file here, and the dataset hub cannot be reached ({reason.splitlines()[0]})",
        hint=f"give a local text, JSONL or Parquet file with {_option(role)} FILE"
        + (", or skip the evaluation with --no-eval" if role == "evaluation" else "")
        + "; HF_HUB_OFFLINE=1 uses a dataset that was downloaded before",
    )


def _option(role: Role) -> str:
    return "--calibration" if role == "calibration" else "--eval (gossamer eval: --data)"


def _load(spec: str, role: Role, *arguments: Any, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(*arguments, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"dataset {spec!r} does not exist or is private: {_first_line(error)}") from error
    except ConnectionError as error:
        raise _unreachable(spec, role, str(error)) from error
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"dataset {spec!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _wikitext2(role: Role) -> TextData:
    split, separator, said = ("test", "\n\n", "two newlines") if role == "evaluation" else ("train", " ", "a space")
    rows = _load("wikitext2", role, "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    return TextData(separator.join(rows["text"]), f"wikitext2 (wikitext-2-raw-v1, {split})", f"rows joined by {said}")


def _ptb(role: Role) -> TextData:
    split = "test" if role == "evaluation" else "train"
    rows = _load("ptb", role, "parquet", data_files={split: _PTB_FILE.format(split=split)}, split=split)
    return TextData(" ".join(rows["sentence"]), f"ptb (penn_treebank, {split})", "rows joined by a space")


def _c4(role: Role) -> TextData:
    split = "validation" if role == "evaluation" else "train"
    rows = _load("c4", role, "allenai/c4", data_files={split: _C4_SHARDS[split]}, split=split)
    name = f"c4 (en, {split}, first shard)"
    if role == "calibration":
        return TextData("", name, "one random window per drawn document", documents=_Column(rows, "text"))
    text = " ".join(rows[:C4_EVALUATION_DOCUMENTS]["text"])
    said = f"first {C4_EVALUATION_DOCUMENTS} documents joined by a space, at most {C4_EVALUATION_WINDOWS} windows"
    return TextData(text, name, said, window_limit=C4_EVALUATION_WINDOWS)


_SHORT: dict[str, Callable[[Role], TextData]] = {"wikitext2": _wikitext2, "ptb": _ptb, "c4": _c4}
SHORT_NAMES = tuple(_SHORT)


class _Column(Sequence[str]):
    """One column of a dataset that stays on disk."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows = rows
        self._name = column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index][self._name]

    def __iter__(self) -> Iterator[str]:
        for batch in self._rows.iter(batch_size=1000):
            yield from batch[self._name]


def _any_dataset(spec: DatasetSpec, role: Role) -> TextData:
    name, rows = _stream(spec, role)
    parts: list[str] = []
    size = 0
    for number, row in enumerate(rows, start=1):
        parts.append(record_text(row, f"{name} row {number}", spec.column))
        size += len(parts[-1])
        if size > MAX_CHARACTERS:
            said = f"the first {number} rows, joined by an empty line"
            break
    else:
        said = "rows joined by an empty line"
    return TextData(join_documents(parts, SEPARATOR), name, said)


def _stream(spec: DatasetSpec, role: Role) -> tuple[str, Any]:
    split = spec.split or _default_split(spec, role)
    rows = _load(spec.id, role, spec.id, spec.config, split=split, streaming=True)
    return f"{spec.id} ({', '.join(part for part in (spec.config, split, spec.column) if part)})", rows


def _default_split(spec: DatasetSpec, role: Role) -> str:
    import datasets

    try:
        names = datasets.get_dataset_split_names(spec.id, spec.config)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"dataset {spec.id!r} cannot be loaded: {_first_line(error)}") from error
    wanted = next((split for split in _SPLITS[role] if split in names), None)
    if wanted is None:
        raise DataError(
            f"dataset {spec.id!r} has no split {' or '.join(_SPLITS[role])} for {role}; it has {', '.join(names)}",
            hint=f"name one: {spec.id}:{spec.config or ''}:{names[0] if names else 'SPLIT'}",
        )
    return wanted
