"""Packed matrices: what `docs/format.md` specifies, checked before anything is used.

The matrix of checkpoint key K is stored as `K_bitmask` (uint8 [rows, ceil(in / 8)]) and `K_values` ([nnz], the kept
entries in row order), plus a record in the file's metadata. Rows are those of the [out, in] view: a source tensor
stored as [in, out] is `transposed`, and E stacked matrices [E, a, b] are rows of one matrix after the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, KernelError
from ..kernels.bitmask.dispatch import compress, expand, pack_bits, row_counts, unpack_bits

FORMAT_VERSION = 1
METADATA_KEY = "gossamer"
BITMASK, VALUES = "_bitmask", "_values"
_FIELDS: dict[str, type] = {
    "shape": list, "in": int, "transposed": bool, "pattern": str, "nnz": int, "mask_sha256": str
}  # fmt: skip


@dataclass(frozen=True)
class MatrixRecord:
    """What the metadata says about one matrix. `shape` and `transposed` describe the source tensor."""

    shape: tuple[int, ...]
    transposed: bool
    pattern: str
    nnz: int
    mask_sha256: str

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

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "in": self.cols,
            "transposed": self.transposed,
            "pattern": self.pattern,
            "nnz": self.nnz,
            "mask_sha256": self.mask_sha256,
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
    """A packed matrix in its final form: `bits` as in SourceMask, `values` [nnz] in row order."""

    bits: Tensor
    values: Tensor
    record: MatrixRecord

    @property
    def mask(self) -> SourceMask:
        return SourceMask(self.bits, self.record)


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
    """The dense source tensor: kept entries bit for bit, +0.0 elsewhere. CheckpointError unless bits fit values."""
    try:
        return packed.record.from_rows(expand(packed.values, packed.bits, packed.record.cols))
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


def metadata(records: Mapping[str, MatrixRecord]) -> dict[str, str]:
    """The metadata of a file with these packed matrices; {"format": "pt"} alone for none."""
    if not records:
        return {"format": "pt"}
    matrices = {key: record.to_json() for key, record in records.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, "matrices": matrices}, separators=(",", ":"))
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
    return {key: _parse_record(value, f"{where}: record of {key}") for key, value in matrices.items()}


def _parse_record(value: Any, where: str) -> MatrixRecord:
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
    record = MatrixRecord(tuple(shape), value["transposed"], value["pattern"], value["nnz"], value["mask_sha256"])
    if value["in"] != record.cols:
        raise CheckpointError(f"{where}: 'in' is {value['in']}, shape and transposed say {record.cols}")
    return record


@dataclass(frozen=True)
class Summary:
    """All masks of a checkpoint: how many matrices, their entries and kept entries, one digest over everything."""

    matrices: int
    entries: int
    kept: int
    masks_sha256: str


def summarise(records: Mapping[str, MatrixRecord]) -> Summary:
    """`masks_sha256`: sha256 of the lines "key mask_sha256", sorted by key."""
    lines = "".join(f"{key} {records[key].mask_sha256}\n" for key in sorted(records))
    entries = sum(math.prod(record.shape) for record in records.values())
    kept = sum(record.nnz for record in records.values())
    return Summary(len(records), entries, kept, hashlib.sha256(lines.encode()).hexdigest())


def sparse_config(config: Mapping[str, Any], summary: Summary, *, recipe: str | None = None) -> dict[str, Any]:
    """config.json of a folder with sparse weights: `dense_config` plus the quantization_config that loads them."""
    return dense_config(config, summary, recipe=recipe) | {
        "quantization_config": {
            "quant_method": METADATA_KEY,
            "format_version": FORMAT_VERSION,
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
        result[METADATA_KEY] = {"format_version": FORMAT_VERSION} | own
    return result
