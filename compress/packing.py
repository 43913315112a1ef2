"""Masked dense tensors to packed values, comparisons by bits, and the structure that a pattern promises."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.bitmask.dispatch import compress
from ..kernels.int8.dispatch import DTYPES, dequantise, round_to
from .format import MatrixRecord, PackedTensor, Scales
from .source import StoredSource

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_values(source: StoredSource, key: str) -> Tensor:
    """Kept entries of a matrix with a mask: as stored (int8 too), or taken from the dense tensor.

    CheckpointError when a dense tensor holds anything but +0.0 where its mask says pruned: packing would lose it.
    """
    values = source.values(key)
    if values is not None:
        return values
    record = source.record(key)
    assert record is not None
    rows = record.as_rows(source.read(key))
    values = compress(rows, source.bits(key))
    lost = nonzero_bits(rows) - nonzero_bits(values)
    if lost:
        raise CheckpointError(
            f"tensor {key} has {lost} entries that are not +0.0 although its mask prunes them",
            hint="the weights were changed without their masks: remove gossamer/masks.safetensors and prune again",
        )
    return values


def written_records(source: StoredSource, kind: str) -> dict[str, MatrixRecord]:
    """The records of a checkpoint of `kind`: beside dense weights they speak of masks alone."""
    records = source.records()
    return records if kind == "sparse" else {key: record.with_floats() for key, record in records.items()}


def as_int8(packed: PackedTensor, tensor: Tensor, known: Scales) -> PackedTensor | None:
    """A matrix with float values as the one with int8 values that it was read from, or None if it is another one now.

    `tensor`: the dense matrix, in any dtype. The scales are those of the file: with them the values come back exactly
    (kernels/int8/README.md), and whether they do is compared bit for bit.
    """
    bits, record = packed.bits, packed.record
    rows = record.as_rows(tensor.cpu())
    if rows.dtype not in DTYPES:
        return None
    values = round_to(known.scales, rows, bits)
    again = dequantise(values, known.scales, bits, record.cols, known.dtype).to(rows.dtype)
    if not torch.equal(as_integers(again), as_integers(rows)):
        return None
    return PackedTensor(bits, values, replace(record, int8=known.dtype), known.scales)


def nonzero_bits(tensor: Tensor) -> int:
    """How many entries are not exactly +0.0 (so -0.0 and NaN count)."""
    return int(as_integers(tensor).count_nonzero())


def as_integers(tensor: Tensor) -> Tensor:
    """The same bits as integers, for comparisons that tell -0.0 from 0.0 and see NaN payloads."""
    return tensor.contiguous().view(_AS_INTEGER[tensor.element_size()])


def holds(record: MatrixRecord, kept: Tensor) -> bool:
    """Whether a mask (bool [rows, in]) has the structure that its pattern names.

    "N:M": at most N of every M consecutive inputs are kept. "block:RxC...": every R x C tile of every stacked matrix
    is kept or pruned as a whole, where tiles fit. Any other pattern promises nothing.
    """
    words = record.pattern.split(":")
    if len(words) == 2 and all(word.isdigit() for word in words):
        return _at_most(kept, int(words[0]), int(words[1]))
    if words[0] == "block" and len(words) >= 2:
        sizes = words[1].split("x")
        if len(sizes) == 2 and all(size.isdigit() for size in sizes):
            return _whole_tiles(kept.view(-1, record.matrix_rows, record.cols), int(sizes[0]), int(sizes[1]))
    return True


def _at_most(kept: Tensor, keep: int, group: int) -> bool:
    if group < 1 or kept.shape[1] % group:
        return False
    groups = kept.to(torch.uint8).view(kept.shape[0], -1, group)
    counts = torch.zeros(groups.shape[:2], dtype=torch.int32)
    for j in range(group):  # much faster than a sum over a short last dimension
        counts += groups[:, :, j]
    return bool((counts <= keep).all())


def _whole_tiles(kept: Tensor, rows: int, cols: int) -> bool:
    count, height, width = kept.shape
    if rows < 1 or cols < 1 or height % rows or width % cols:
        return True  # a part of a fused matrix: its tiles cross into another tensor
    tiles = kept.view(count, height // rows, rows, width // cols, cols)
    return bool((tiles.all(4).all(2) == tiles.any(4).any(2)).all())
