"""Writing safetensors files of any size: header first, data streamed, durable before the final name appears."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..errors import ResourceError
from .failpoint import failpoint
from .format import PackedTensor, metadata
from .safefile import DTYPE_NAMES
from .table import byte_view, natural_key

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Output:
    """One tensor to write. `data` gives its bytes, in order, as uint8 tensors; called once, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def output(name: str, tensor: Tensor) -> Output:
    """A tensor in memory as an Output."""
    return Output(name, tensor.dtype, tuple(tensor.shape), lambda: iter([byte_view(tensor.detach().cpu())]))


def write_part(path: Path, dense: Mapping[str, Tensor], packed: Mapping[str, PackedTensor]) -> None:
    """One finished unit of work (a decoder block) as a safetensors file that appears whole or not at all.

    `dense`: checkpoint key -> tensor stored as it is; `packed`: checkpoint key -> packed matrix.
    """
    outputs = [output(key, tensor) for key, tensor in dense.items()]
    for key, matrix in packed.items():
        outputs += [output(name, tensor) for name, tensor in matrix.tensors(key).items()]
    records = {key: packed[key].record for key in sorted(packed, key=natural_key)}
    write_file(path, outputs, metadata(records), halfway="part")


def write_file(
    path: Path, outputs: Iterable[Output], file_metadata: Mapping[str, str], *, halfway: str | None = None
) -> int:
    """Write a safetensors file and return its size. `halfway`: a failpoint passed when half of the data is written.

    Tensors are ordered by falling element size, then by name, so that each is aligned to its elements. The file is
    flushed to disk under another name and renamed. ResourceError when the disk is full or may not be written.
    """
    ordered = sorted(outputs, key=lambda item: (-item.dtype.itemsize, natural_key(item.name)))
    header = _header(ordered, file_metadata)
    payload = sum(item.nbytes for item in ordered)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_room(path, len(header) + payload)
    with replacing(path, len(header) + payload) as file:
        file.write(header)
        done, passed = 0, False
        for item in ordered:
            done += _write_tensor(file, item)
            if halfway is not None and not passed and 2 * done >= payload:
                file.flush()
                failpoint(halfway)
                passed = True
    return len(header) + payload


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all, and is on disk when this returns."""
    data = text.encode("utf-8")
    with replacing(Path(path), len(data)) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, nbytes: int) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends well; removed when it does not."""
    temporary = path.with_name(path.name + ".tmp")
    with storage_errors(path, nbytes):
        try:
            with open(temporary, "wb", buffering=2**20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def storage_errors(path: Path, nbytes: int) -> Iterator[None]:
    """Disk full, file too large and missing permission as ResourceError with the number of bytes needed."""
    try:
        yield
    except OSError as error:
        if error.errno in _STORAGE:
            raise ResourceError(
                f"{path} needs {nbytes} bytes and cannot be written: {error.strerror}",
                hint="free disk space, or choose another folder",
            ) from error
        if error.errno in _FORBIDDEN:
            raise ResourceError(
                f"no permission to write {path} ({nbytes} bytes): {error.strerror}",
                hint="choose a folder that you may write to",
            ) from error
        raise


def _check_room(path: Path, nbytes: int) -> None:
    """Fail before writing rather than after filling the disk."""
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise ResourceError(
            f"{path} needs {nbytes} bytes, {free} are free", hint="free disk space, or choose another folder"
        )


def _header(outputs: list[Output], file_metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(file_metadata)}
    position = 0
    for item in outputs:
        if item.name in entries:
            raise ValueError(f"{item.name} occurs twice")
        entries[item.name] = {
            "dtype": DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [position, position + item.nbytes],
        }
        position += item.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: IO[bytes], item: Output) -> int:
    written = 0
    for piece in item.data():
        file.write(piece.numpy().data)
        written += piece.numel()
    if written != item.nbytes:
        raise ValueError(f"{item.name}: {written} bytes given, {item.nbytes} announced")
    return written
