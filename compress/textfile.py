"""Local text: a file (plain text, JSONL, Parquet; optionally gzipped) or a folder of such files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ..errors import DataError
from .textdata import SEPARATOR, TextData, join_documents, record_text

_JSON_LINES = (".jsonl", ".ndjson")
_IN_FOLDER = (".txt", ".md", ".raw", ".text", ".rst", ".json", ".parquet", *_JSON_LINES)


def read_path(path: Path) -> TextData:
    """The text below `path`. DataError for anything that is not readable UTF-8 text, JSONL or Parquet."""
    if path.is_dir():
        files = _files_below(path)
        text = join_documents(_read_file(file) for file in files)
        return TextData(text, name=path.name or str(path), protocol=f"{len(files)} files joined by an empty line")
    protocol = "the file as it is" if _kind(path) == "text" else "records joined by an empty line"
    return TextData(_read_file(path), name=path.name, protocol=protocol)


def read_records(path: Path) -> Iterator[tuple[object, str]] | None:
    """(record, where it is) of a JSON, JSONL or Parquet file, or of a folder's, one file after another by name.

    None for running text. DataError as `read_path`, and for a folder that holds both.
    """
    files = _files_below(path) if path.is_dir() else [path]
    records = [file for file in files if _kind(file) != "text"]
    if not records:
        return None
    texts = [file for file in files if file not in records and file.stem.lower() != "readme"]  # of a dataset's folder
    if texts:
        raise DataError(
            f"{path} mixes records ({records[0].relative_to(path)}) and running text ({texts[0].relative_to(path)})",
            hint="give a folder of one kind, or one file",
        )
    return chain.from_iterable(map(_records, records))


def looks_like_path(spec: str) -> bool:
    """Whether a DATA argument that does not exist was meant as a file rather than a dataset id."""
    return spec.startswith((".", "/", "~")) or "\\" in spec or _kind(Path(spec)) != "text" or spec.endswith(_IN_FOLDER)


def _files_below(folder: Path) -> list[Path]:
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _bare(path).suffix.lower() in _IN_FOLDER
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise DataError(
            f"{folder} holds no text files", hint=f"files ending in {', '.join(_IN_FOLDER)} are read (also gzipped)"
        )
    return found


def _read_file(path: Path) -> str:
    kind = _kind(path)
    if kind == "text":
        return _decode(path)
    return join_documents((_row(*found) for found in _records(path)), SEPARATOR)


def _records(path: Path) -> Iterator[tuple[object, str]]:
    return _parquet_records(path) if _kind(path) == "parquet" else _json_records(_decode(path), path)


def _kind(path: Path) -> str:
    suffix = _bare(path).suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    return "jsonl" if suffix in (*_JSON_LINES, ".json") else "text"


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})",
            hint="convert it to UTF-8, or give a .txt, .jsonl or .parquet file",
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty", hint="give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # what Python's own text mode does


def _json_records(text: str, path: Path) -> Iterator[tuple[object, str]]:
    if text.lstrip().startswith("["):
        yield from _json_array(text, path)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg}") from error
        yield record, f"{path} line {number}"


def _json_array(text: str, path: Path) -> Iterator[tuple[object, str]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg} (line {error.lineno})") from error
    for number, record in enumerate(records, start=1):
        yield record, f"{path} entry {number}"


def _row(record: object, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise DataError(f"{where} is {type(record).__name__}, not an object with a `text` field")
    return record_text(record, where)


def _parquet_records(path: Path) -> Iterator[tuple[object, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} is a Parquet file and pyarrow is not installed", hint="pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches():
            for number, record in enumerate(batch.to_pylist(), start=1):
                yield record, f"{path} row {number}"
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
