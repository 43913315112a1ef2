"""Packed matrices: what `docs/format.md` specifies, checked before anything is used.

The matrix of checkpoint key K is stored as `K_bitmask` (uint8 [rows, ceil(in / 8)]) and `K_values` ([nnz], the kept
entries in row order), plus a record in the file's metadata. Rows are those of the [out, in] view: a source tensor
stored as [in, out] is `transposed`, and E stacked matrices [E, a, b] are rows of one matrix after the other. Values
are floats, or int8 with `K_scales` (float16 [rows, ceil(in / 128)]).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, KernelError
from ..kernels.bitmask.dispatch import compress, expand, pack_bits, row_counts, unpack_bits
from ..kernels.int8.dispatch import check_scales, dequantise
from .record import (
    BITMASK,
    FORMAT_VERSION,
    INT8,
    METADATA_KEY,
    SCALES,
    VALUES,
    MatrixRecord,
    metadata,
    packed_bytes,
    parse_metadata,
    stored_names,
    version_of,
)

__all__ = [
    "BITMASK", "FORMAT_VERSION", "INT8", "METADATA_KEY", "SCALES", "VALUES", "MatrixRecord", "PackedTensor", "Scales",
    "SourceMask", "Summary", "bits_sha256", "check_bits", "check_scales_of", "dense_config", "metadata", "pack",
    "packed_bytes", "parse_metadata", "record_of", "sparse_config", "stored_names", "summarise", "unpack", "version_of",
]  # fmt: skip


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
