"""Records of packed matrices: what a file's metadata says about them, written, and read with every field checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.int8.dispatch import DTYPES, GROUP, group_count
from .safefile import DTYPE_NAMES

FORMAT_VERSION = 2  # the highest that is read; what needs no more is written as version 1
METADATA_KEY = "gossamer"
BITMASK, VALUES, SCALES = "_bitmask", "_values", "_scales"
INT8 = f"int8, group {GROUP}"
_INT8_DTYPES = {DTYPE_NAMES[dtype]: dtype for dtype in DTYPES}
_FIELDS: dict[str, type] = {
    "shape": list, "in": int, "transposed": bool, "pattern": str, "nnz": int, "mask_sha256": str
}  # fmt: skip


@dataclass(frozen=True)
class MatrixRecord:
    """What the metadata says about one matrix. `shape` and `transposed` describe the source tensor.

    `int8`: None for values that are floats; for int8 values the dtype of the matrix that they are read as.
    """

    shape: tuple[int, ...]
    transposed: bool
    pattern: str
    nnz: int
    mask_sha256: str
    int8: torch.dtype | None = None

    @property
    def cols(self) -> int:
        """Inputs: the length of a row of the [out, in] view."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def matrix_rows(self) -> int:
        """Outputs of one of the stacked matrices."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def rows(self) -> int:
        """Rows over all stacked matrices."""
        return math.prod(self.shape[:-2]) * self.matrix_rows

    @property
    def zeros(self) -> int:
        return math.prod(self.shape) - self.nnz

    @property
    def bits_shape(self) -> tuple[int, int]:
        return self.rows, -(-self.cols // 8)

    @property
    def scales_shape(self) -> tuple[int, int]:
        return self.rows, group_count(self.cols)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the packed matrix; `dtype`: of its values, if they are floats."""
        return packed_bytes(self.rows, self.cols, self.nnz, dtype, int8=self.int8 is not None)

    def with_floats(self) -> MatrixRecord:
        """The record of the same mask without int8 values."""
        return replace(self, int8=None)

    def to_json(self) -> dict[str, Any]:
        int8 = {} if self.int8 is None else {"int8": {"group": GROUP, "dtype": DTYPE_NAMES[self.int8]}}
        return {
            "shape": list(self.shape),
            "in": self.cols,
            "transposed": self.transposed,
            "pattern": self.pattern,
            "nnz": self.nnz,
            "mask_sha256": self.mask_sha256,
            **int8,
        }

    def as_rows(self, tensor: Tensor) -> Tensor:
        """[rows, in] view (a copy when transposed) of a tensor of the source's shape."""
        return (tensor.transpose(-1, -2) if self.transposed else tensor).reshape(self.rows, self.cols)

    def from_rows(self, matrix: Tensor) -> Tensor:
        """The inverse of `as_rows`, contiguous."""
        if not self.transposed:
            return matrix.reshape(self.shape).contiguous()
        return matrix.view(*self.shape[:-2], self.matrix_rows, self.cols).transpose(-1, -2).contiguous()


def packed_bytes(rows: int, cols: int, nnz: int, dtype: torch.dtype, *, int8: bool) -> int:
    """Bytes of a packed matrix [rows, cols] with `nnz` values of `dtype`, or of int8 with their scales."""
    mask = rows * -(-cols // 8)
    return mask + (nnz + 2 * rows * group_count(cols) if int8 else nnz * dtype.itemsize)


def stored_names(key: str, record: MatrixRecord) -> list[str]:
    """Names of the tensors of a packed matrix."""
    return [key + end for end in (BITMASK, VALUES, *([] if record.int8 is None else [SCALES]))]


def version_of(records: Iterable[MatrixRecord]) -> int:
    """The lowest format version that can say it: 2 with int8 values, else 1."""
    return 1 if all(record.int8 is None for record in records) else 2


def metadata(records: Mapping[str, MatrixRecord]) -> dict[str, str]:
    """The metadata of a file with these packed matrices; {"format": "pt"} alone for none."""
    if not records:
        return {"format": "pt"}
    matrices = {key: record.to_json() for key, record in records.items()}
    document = {"format_version": version_of(records.values()), "matrices": matrices}
    text = json.dumps(document, separators=(",", ":"))
    return {"format": "pt", METADATA_KEY: text}


def parse_metadata(file_metadata: Mapping[str, str], where: str) -> dict[str, MatrixRecord]:
    """The records in a file's metadata; {} without ours. CheckpointError naming `where` for a malformed one."""
    text = file_metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: metadata {METADATA_KEY!r} is not JSON: {error}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: metadata {METADATA_KEY!r} has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format version {version}, this Gossamer reads up to {FORMAT_VERSION}",
            hint="install a newer Gossamer",
        )
    matrices = document.get("matrices")
    if not isinstance(matrices, dict):
        raise CheckpointError(f"{where}: metadata {METADATA_KEY!r} has no object 'matrices'")
    return {key: _parse_record(value, f"{where}: record of {key}", version) for key, value in matrices.items()}


def _parse_record(value: Any, where: str, version: int) -> MatrixRecord:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not an object")
    for name, kind in _FIELDS.items():
        if type(value.get(name)) is not kind:
            raise CheckpointError(f"{where}: {name!r} must be {kind.__name__}, it is {value.get(name)!r}")
    shape = value["shape"]
    if len(shape) not in (2, 3) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise CheckpointError(f"{where}: shape {shape} is not that of a matrix or of stacked matrices")
    if not 0 <= value["nnz"] <= math.prod(shape):
        raise CheckpointError(f"{where}: nnz {value['nnz']} for shape {shape}")
    if not re.fullmatch(r"[0-9a-f]{64}", value["mask_sha256"]):
        raise CheckpointError(f"{where}: mask_sha256 is not a sha256 in lower-case hex")
    record = MatrixRecord(
        tuple(shape),
        value["transposed"],
        value["pattern"],
        value["nnz"],
        value["mask_sha256"],
        _parse_int8(value["int8"], where) if version > 1 and "int8" in value else None,
    )
    if value["in"] != record.cols:
        raise CheckpointError(f"{where}: 'in' is {value['in']}, shape and transposed say {record.cols}")
    return record


def _parse_int8(value: Any, where: str) -> torch.dtype:
    """The dtype that int8 values are read as. Version 1 knows no such field, and ignores it like any other."""
    if not isinstance(value, dict) or type(value.get("group")) is not int or not isinstance(value.get("dtype"), str):
        raise CheckpointError(f"{where}: 'int8' must be an object with group and dtype, it is {value!r}")
    if value["group"] != GROUP:
        raise CheckpointError(f"{where}: int8 values in groups of {value['group']}, allowed: {GROUP}")
    if value["dtype"] not in _INT8_DTYPES:
        raise CheckpointError(f"{where}: int8 values of {value['dtype']}, allowed: {', '.join(_INT8_DTYPES)}")
    return _INT8_DTYPES[value["dtype"]]
