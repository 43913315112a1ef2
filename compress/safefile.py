"""One safetensors file, read without mapping it: header checked completely, tensors read into memory of their own.

Mapped pages stay resident as long as the kernel likes; with `pread` a process holds exactly the tensors it asked for.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ResourceError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
CHUNK_BYTES = 16 * 2**20

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, t) for name, t in _NAMES.items() if hasattr(torch, t)}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `offset` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafeFile:
    """Header and tensors of one safetensors file.

    `entries`: name -> Entry in file order. `metadata`: the file's own strings. Raises CheckpointError naming the file
    (and the tensor) for everything that does not fit together, ResourceError when the file may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with _opened(self.path) as file:
            self.size = os.fstat(file.fileno()).st_size
            header, start = self._header(file)
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.entries = {name: self._entry(name, value, start) for name, value in header.items()}
        self._check_cover(start)

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, name: str) -> Tensor:
        """The tensor `name`, bit for bit, in memory of its own."""
        entry = self.entries[name]
        return self._read(entry.offset, entry.nbytes).view(entry.dtype).view(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along its first dimension; only those bytes are read. 0 <= start <= stop <= rows."""
        entry = self.entries[name]
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"rows {start}:{stop} of {name} {list(entry.shape)}")
        row = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        flat = self._read(entry.offset + start * row, (stop - start) * row)
        return flat.view(entry.dtype).view(stop - start, *entry.shape[1:])

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's bytes, in order, as uint8 pieces of at most CHUNK_BYTES."""
        entry = self.entries[name]
        for done in range(0, entry.nbytes, CHUNK_BYTES):
            yield self._read(entry.offset + done, min(CHUNK_BYTES, entry.nbytes - done))

    def _read(self, offset: int, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        view = buffer.numpy().data
        with _opened(self.path) as file:
            while view:
                count = os.preadv(file.fileno(), [view], offset)
                if count == 0:
                    raise CheckpointError(f"{self.path} became shorter while it was read")
                view, offset = view[count:], offset + count
        return buffer

    def _header(self, file: Any) -> tuple[dict[str, Any], int]:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise self._bad(f"has {self.size} bytes, fewer than a safetensors header")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, self.size - 8):
            raise self._bad(f"announces a header of {length} bytes in a file of {self.size}")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"has a header that is not JSON: {str(error).splitlines()[0]}") from error
        if not isinstance(header, dict):
            raise self._bad("has a header that is not a JSON object")
        return header, 8 + length

    def _metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise self._bad("has __metadata__ that is not an object of strings")
        return value

    def _entry(self, name: str, value: Any, start: int) -> Entry:
        if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
            raise self._bad(f"lacks dtype, shape or data_offsets of tensor {name}")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._bad(f"has tensor {name} of unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if not _counts(shape):
            raise self._bad(f"has tensor {name} of impossible shape {shape!r}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"has tensor {name} at impossible offsets {offsets!r}")
        begin, end = offsets
        if end > self.size - start:
            raise self._bad(f"is cut short: tensor {name} ends at byte {start + end}, the file at {self.size}")
        if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise self._bad(f"gives {end - begin} bytes to tensor {name}, {dtype} {shape}")
        return Entry(DTYPES[dtype], tuple(shape), start + begin, end - begin)

    def _check_cover(self, start: int) -> None:
        """Tensors lie one after the other, without gap or overlap, from the header to the end of the file."""
        position = start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != position:
                what = "overlaps the one before" if entry.offset < position else "leaves a gap before it"
                raise self._bad(f"has tensor {name} at byte {entry.offset}, which {what}")
            position += entry.nbytes
        if position != self.size:
            raise self._bad(f"has {self.size - position} bytes that belong to no tensor")

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}", hint="the file is damaged or was not completely copied")


def _opened(path: Path) -> Any:
    try:
        return open(path, "rb", buffering=0)
    except PermissionError as error:
        raise ResourceError(f"no permission to read {path}") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise ResourceError(f"{path}: {error.strerror}", hint="raise the limit of open files") from error
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} occurs twice")
        result[key] = value
    return result
