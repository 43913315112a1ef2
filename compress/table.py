"""The tensors of several safetensors files under one set of checkpoint keys, packed matrices read as one tensor."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .format import (
    BITMASK,
    SCALES,
    VALUES,
    MatrixRecord,
    PackedTensor,
    SourceMask,
    check_bits,
    check_scales_of,
    parse_metadata,
    stored_names,
    unpack,
)
from .legacy import find_legacy
from .safefile import Entry, SafeFile

SMALL_FILE = 64 * 2**20
SAMPLE, SAMPLES = 2**20, 64


@dataclass(frozen=True)
class TensorMeta:
    """dtype and shape of a checkpoint tensor, as it is read (dense)."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def natural_key(key: str) -> list[tuple[int, int, str]]:
    """Sort key in which layers.2 comes before layers.10."""
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key) if part]


class TensorTable:
    """Plain tensors, packed matrices and old bitmask matrices of `files`.

    A record may stand in another file of the set than its tensors, as it does when a library shards a state dict.
    `values`: False for a file of masks alone. Raises CheckpointError naming the tensor for duplicates, missing halves
    and shapes or dtypes that do not fit the record.
    """

    def __init__(self, files: Iterable[SafeFile], *, values: bool = True) -> None:
        self.files = list(files)
        self._where = _unique(self.files)
        self._records = self._collect_records()
        self._legacy = find_legacy(self._where) if values else {}
        for key, record in self._records.items():
            self._check_matrix(key, record, values)
        parts = {name for key, record in self._records.items() for name in stored_names(key, record)}
        parts |= {name for matrix in self._legacy.values() for name in matrix.tensors}
        self._plain = {name for name in self._where if name not in parts}
        for name in self._plain:
            self._check_plain(name)

    def keys(self) -> list[str]:
        """Checkpoint keys in natural order."""
        return sorted([*self._plain, *self._records, *self._legacy], key=natural_key)

    def __contains__(self, key: object) -> bool:
        return key in self._records or key in self._legacy or key in self._plain

    def meta(self, key: str) -> TensorMeta:
        record = self._records.get(key)
        if record is not None:
            return TensorMeta(record.int8 or self._entry(key + VALUES).dtype, record.shape)
        if key in self._legacy:
            return TensorMeta(self._legacy[key].dtype, self._legacy[key].shape)
        entry = self._entry(key)
        return TensorMeta(entry.dtype, entry.shape)

    def record(self, key: str) -> MatrixRecord | None:
        """The record of a packed matrix, or None. An old bitmask matrix has its bits read for that."""
        if key in self._legacy:
            return self._legacy[key].record
        return self._records.get(key)

    def bits(self, key: str) -> Tensor:
        """The checked mask of a packed matrix, uint8 [rows, ceil(in / 8)]."""
        if key in self._legacy:
            return self._legacy[key].bits()
        bits = self._read(key + BITMASK)
        check_bits(bits, self._records[key], key)
        return bits

    def values(self, key: str) -> Tensor:
        """Kept entries of a packed matrix as stored, [nnz]."""
        return self._legacy[key].values() if key in self._legacy else self._read(key + VALUES)

    def scales(self, key: str) -> Tensor | None:
        """The checked scales of a packed matrix, or None where its values are floats."""
        record = self._records.get(key)
        if record is None or record.int8 is None:
            return None
        scales = self._read(key + SCALES)
        check_scales_of(scales, record, key)
        return scales

    def mask(self, key: str) -> SourceMask | None:
        """The explicit mask of a packed matrix, or None."""
        record = self.record(key)
        return None if record is None else SourceMask(self.bits(key), record)

    def read(self, key: str) -> Tensor:
        """The tensor, dense, bit for bit."""
        record = self.record(key)
        if record is None:
            return self._read(key)
        return unpack(PackedTensor(self.bits(key), self.values(key), record, self.scales(key)), key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along the first dimension; of a plain tensor only those bytes are read."""
        if self.record(key) is None:
            return self._where[key].read_rows(key, start, stop)
        return self.read(key)[start:stop].clone()

    def chunks(self, key: str) -> Iterator[Tensor]:
        """Bytes of the dense tensor as uint8 pieces; a plain tensor is never in memory as a whole."""
        if self.record(key) is None:
            yield from self._where[key].chunks(key)
        else:
            yield byte_view(self.read(key))

    def nbytes(self) -> int:
        """Bytes of all tensors when read."""
        return sum(self.meta(key).nbytes for key in self.keys())

    def _entry(self, name: str) -> Entry:
        return self._where[name].entries[name]

    def _read(self, name: str) -> Tensor:
        return self._where[name].read(name)

    def _collect_records(self) -> dict[str, MatrixRecord]:
        records: dict[str, MatrixRecord] = {}
        for file in self.files:
            for key, record in parse_metadata(file.metadata, str(file.path)).items():
                if records.setdefault(key, record) != record:
                    raise CheckpointError(f"{file.path}: record of {key} differs from that of another file")
        return records

    def _check_matrix(self, key: str, record: MatrixRecord, values: bool) -> None:
        if record.int8 is not None and not values:
            raise CheckpointError(f"the record of {key} speaks of int8 values, but its weights are stored dense")
        for name in stored_names(key, record) if values else [key + BITMASK]:
            if name not in self._where:
                raise CheckpointError(f"tensor {name} is missing: the metadata announces matrix {key}")
        bits = self._entry(key + BITMASK)
        if bits.dtype != torch.uint8 or bits.shape != record.bits_shape:
            raise CheckpointError(
                f"tensor {key + BITMASK} must be uint8 {list(record.bits_shape)}, it is {bits.dtype} {list(bits.shape)}"
            )
        if not values:
            return
        if key in self._where:
            raise CheckpointError(f"tensor {key} is stored both dense and packed")
        kept = self._entry(key + VALUES)
        if record.int8 is not None:
            self._check_int8(key, record, kept)
        elif not kept.dtype.is_floating_point or kept.shape != (record.nnz,):
            raise CheckpointError(
                f"tensor {key + VALUES} must be floats [{record.nnz}], it is {kept.dtype} {list(kept.shape)}"
            )

    def _check_int8(self, key: str, record: MatrixRecord, kept: Entry) -> None:
        if kept.dtype != torch.int8 or kept.shape != (record.nnz,):
            raise CheckpointError(
                f"tensor {key + VALUES} must be int8 [{record.nnz}], it is {kept.dtype} {list(kept.shape)}"
            )
        scales = self._entry(key + SCALES)
        if scales.dtype != torch.float16 or scales.shape != record.scales_shape:
            raise CheckpointError(
                f"tensor {key + SCALES} must be float16 {list(record.scales_shape)}, "
                f"it is {scales.dtype} {list(scales.shape)}"
            )

    def _check_plain(self, name: str) -> None:
        """Halves of a packed matrix without their record would load as nonsense."""
        if name.endswith(BITMASK) and name.removesuffix(BITMASK) + VALUES in self._where:
            raise CheckpointError(
                f"{self._where[name].path}: tensor {name} is packed, but the metadata has no record of it",
                hint="the file was written again by a program that drops safetensors metadata",
            )


def byte_view(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as a flat uint8 view."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def open_files(paths: Iterable[Path], *, values: bool = True) -> TensorTable:
    """Headers of `paths` as one table."""
    return TensorTable([SafeFile(path) for path in paths], values=values)


def file_digest(path: Path) -> str:
    """sha256 of size and content; of a file from 64 MiB on, of 64 evenly spaced slices of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, 2)
        digest.update(f"{size}\n".encode())
        if size < SMALL_FILE:
            starts = list(range(0, size, SAMPLE))
        else:
            starts = [i * (size - SAMPLE) // (SAMPLES - 1) for i in range(SAMPLES)]
        for start in starts:
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _unique(files: list[SafeFile]) -> dict[str, SafeFile]:
    where: dict[str, SafeFile] = {}
    for file in files:
        for name in file.entries:
            if name in where:
                raise CheckpointError(f"tensor {name} is in {where[name].name} and again in {file.path}")
            where[name] = file
    return where
