"""Packed matrices: what `docs/format.md` specifies, checked before anything is used.

The matrix of checkpoint key K is stored as `K_bitmask` (uint8 [rows, ceil(in / 8)]) and `K_values` ([nnz], the kept
entries in row order), plus a record in the file's metadata. Rows are those of the [out, in] view: a source tensor
stored as [in, out] is `transposed`, and E stacked matrices [E, a, b] are rows of one matrix after the other. Values
are floats, or int8 with `K_scales` (float16 [rows, ceil(in / 128)]).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, KernelError
from ..kernels.bitmask.dispatch import compress, expand, pack_bits, row_counts, unpack_bits
from ..kernels.int8.dispatch import DTYPES, GROUP, check_scales, dequantise, group_count
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


@dataclass(frozen=True, eq=False)
class SourceMask:
    """The explicit mask of one checkpoint tensor. `bits`: uint8 [rows, ceil(in / 8)], rows of the [out, in] view."""

    bits: Tensor
    record: MatrixRecord

    @property
    def pattern(self) -> str:
        return self.record.pattern

    @property
    def zeros(self) -> int:
        """Number of pruned entries."""
        return self.record.zeros

    def rows_bool(self) -> Tensor:
        """bool [rows, in], True = kept."""
        return unpack_bits(self.bits, self.record.cols)

    def to_bool(self) -> Tensor:
        """bool in the shape and orientation of the source tensor, True = kept."""
        return self.record.from_rows(self.rows_bool())

    def sha256(self) -> str:
        return self.record.mask_sha256


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A packed matrix in its final form: `bits` as in SourceMask, `values` [nnz] in row order.

    `scales`: of int8 values (`record.int8`), else None.
    """

    bits: Tensor
    values: Tensor
    record: MatrixRecord
    scales: Tensor | None = None

    @property
    def mask(self) -> SourceMask:
        return SourceMask(self.bits, self.record)

    def tensors(self, key: str) -> dict[str, Tensor]:
        """What is stored for checkpoint key `key`, by name."""
        named = {key + BITMASK: self.bits, key + VALUES: self.values}
        return named if self.scales is None else named | {key + SCALES: self.scales}


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of int8 values, float16 [rows, ceil(in / 128)], and the dtype that the matrix is read as."""

    scales: Tensor
    dtype: torch.dtype


def packed_bytes(rows: int, cols: int, nnz: int, dtype: torch.dtype, *, int8: bool) -> int:
    """Bytes of a packed matrix [rows, cols] with `nnz` values of `dtype`, or of int8 with their scales."""
    mask = rows * -(-cols // 8)
    return mask + (nnz + 2 * rows * group_count(cols) if int8 else nnz * dtype.itemsize)


def stored_names(key: str, record: MatrixRecord) -> list[str]:
    """Names of the tensors of a packed matrix."""
    return [key + end for end in (BITMASK, VALUES, *([] if record.int8 is None else [SCALES]))]


def record_of(bits: Tensor, shape: tuple[int, ...], *, transposed: bool, pattern: str) -> MatrixRecord:
    """The record of a mask given as packed rows."""
    return MatrixRecord(tuple(shape), transposed, pattern, int(row_counts(bits).sum()), bits_sha256(bits))


def pack(tensor: Tensor, mask: Tensor, *, pattern: str, transposed: bool = False) -> PackedTensor:
    """Pack a source tensor with its mask (bool, same shape and orientation, True = kept).

    `transposed`: the last two dimensions are [in, out]. What the mask drops is lost, whatever its value.
    """
    if tensor.dim() < 2 or mask.shape != tensor.shape or mask.dtype != torch.bool:
        raise ValueError(f"a mask {mask.dtype} {list(mask.shape)} for a tensor {list(tensor.shape)}")
    shape = tuple(tensor.shape)
    layout = MatrixRecord(shape, transposed, pattern, 0, "")
    bits = pack_bits(layout.as_rows(mask))
    record = record_of(bits, shape, transposed=transposed, pattern=pattern)
    return PackedTensor(bits, compress(layout.as_rows(tensor), bits), record)


def unpack(packed: PackedTensor, key: str) -> Tensor:
    """The dense source tensor: kept entries bit for bit, +0.0 elsewhere. CheckpointError unless bits fit values.

    int8 values are multiplied by their scales and rounded to the dtype that the record names.
    """
    record = packed.record
    try:
        if packed.scales is None or record.int8 is None:
            return record.from_rows(expand(packed.values, packed.bits, record.cols))
        return record.from_rows(dequantise(packed.values, packed.scales, packed.bits, record.cols, record.int8))
    except KernelError as error:
        raise CheckpointError(f"tensor {key}: {error.message}", hint="the file is damaged") from error


def bits_sha256(bits: Tensor) -> str:
    """sha256 of the mask bytes, row after row."""
    return hashlib.sha256(bits.cpu().contiguous().numpy().data).hexdigest()


def check_bits(bits: Tensor, record: MatrixRecord, key: str) -> None:
    """Shape, unused bits, count and hash of a mask as read. CheckpointError naming the tensor."""
    name = key + BITMASK
    if bits.dtype != torch.uint8 or tuple(bits.shape) != record.bits_shape:
        raise CheckpointError(
            f"tensor {name} must be uint8 {list(record.bits_shape)}, it is {bits.dtype} {list(bits.shape)}"
        )
    if record.cols % 8 and bool((bits[:, -1] >> (record.cols % 8)).any()):
        raise CheckpointError(f"tensor {name} has bits beyond column {record.cols - 1}")
    found = int(row_counts(bits).sum())
    if found != record.nnz:
        raise CheckpointError(f"tensor {name} has {found} bits set, its record says {record.nnz}")
    if bits_sha256(bits) != record.mask_sha256:
        raise CheckpointError(f"tensor {name} does not have the sha256 of its record", hint="the mask was changed")


def check_scales_of(scales: Tensor, record: MatrixRecord, key: str) -> None:
    """Shape, dtype and range of scales as read. CheckpointError naming the tensor."""
    assert record.int8 is not None
    try:
        check_scales(scales, record.rows, record.cols, record.int8)
    except KernelError as error:
        raise CheckpointError(f"tensor {key + SCALES}: {error.message}", hint="the file is damaged") from error


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


@dataclass(frozen=True)
class Summary:
    """All masks of a checkpoint: how many matrices, their entries and kept entries, one digest over everything.

    `version`: the format version that its files need.
    """

    matrices: int
    entries: int
    kept: int
    masks_sha256: str
    version: int = 1


def summarise(records: Mapping[str, MatrixRecord]) -> Summary:
    """`masks_sha256`: sha256 of the lines "key mask_sha256", sorted by key."""
    lines = "".join(f"{key} {records[key].mask_sha256}\n" for key in sorted(records))
    entries = sum(math.prod(record.shape) for record in records.values())
    kept = sum(record.nnz for record in records.values())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return Summary(len(records), entries, kept, digest, version_of(records.values()))


def sparse_config(config: Mapping[str, Any], summary: Summary, *, recipe: str | None = None) -> dict[str, Any]:
    """config.json of a folder with sparse weights: `dense_config` plus the quantization_config that loads them."""
    return dense_config(config, summary, recipe=recipe) | {
        "quantization_config": {
            "quant_method": METADATA_KEY,
            "format_version": summary.version,
            "modules": summary.matrices,
            "masks_sha256": summary.masks_sha256,
        }
    }


def dense_config(config: Mapping[str, Any], summary: Summary, *, recipe: str | None = None) -> dict[str, Any]:
    """config.json of a folder with dense weights: no quantization_config; masks and recipe named under our own key.

    `recipe`: sha256 of the recipe; None keeps the one that `config` has.
    """
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    before = config.get(METADATA_KEY)
    own: dict[str, Any] = {}
    if summary.matrices:
        own |= {"matrices": summary.matrices, "masks_sha256": summary.masks_sha256}
    if isinstance(before, dict):
        own |= {
            key: value for key, value in before.items() if key not in ("format_version", "matrices", "masks_sha256")
        }
    if recipe is not None:
        own["recipe_sha256"] = recipe
    if own:
        result[METADATA_KEY] = {"format_version": summary.version} | own
    return result
