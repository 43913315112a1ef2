"""The old compressed-tensors bitmask layout, read only.

Matrix P: `P.compressed` (kept entries in row order), `P.bitmask` (uint8 [rows, ceil(cols / 8)], little bit order),
`P.shape` (two integers), and, except in the 2:4 variant, `P.row_offsets` (where each row starts among the kept
entries). P is the module's name or the whole name of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.bitmask.dispatch import row_counts
from .format import MatrixRecord, check_bits, record_of
from .safefile import SafeFile

_ENDS = (".compressed", ".bitmask", ".shape", ".row_offsets")


@dataclass(frozen=True)
class LegacyMatrix:
    """One matrix of the old layout. `prefix`: P above; `where`: which file holds which tensor."""

    key: str
    prefix: str
    where: Mapping[str, SafeFile]

    @property
    def tensors(self) -> list[str]:
        return [self.prefix + end for end in _ENDS if self.prefix + end in self.where]

    @property
    def dtype(self) -> torch.dtype:
        return self.where[self.prefix + ".compressed"].entries[self.prefix + ".compressed"].dtype

    @cached_property
    def shape(self) -> tuple[int, int]:
        found = self._read(".shape")
        if found.numel() != 2 or found.is_floating_point() or int(found.min()) < 0:
            raise CheckpointError(f"tensor {self.prefix}.shape must be the two lengths of a matrix")
        rows, cols = (int(n) for n in found.flatten())
        return rows, cols

    @cached_property
    def record(self) -> MatrixRecord:
        """Made from the bits, which are read and checked against everything else that the layout states."""
        rows, cols = self.shape
        bits = self._raw_bits()
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-cols // 8)):
            raise CheckpointError(f"tensor {self.prefix}.bitmask does not fit the shape {rows} x {cols}")
        counts = row_counts(bits)
        nnz = int(counts.sum())
        if self.values().numel() != nnz:
            raise CheckpointError(
                f"tensor {self.prefix}.compressed has {self.values().numel()} entries, the bitmask keeps {nnz}"
            )
        self._check_offsets(counts)
        pattern = repr(round(1 - nnz / max(1, rows * cols), 6))
        record = record_of(bits, self.shape, transposed=False, pattern=pattern)
        check_bits(bits, record, self.prefix + ".bitmask")
        return record

    def bits(self) -> Tensor:
        """The checked mask."""
        assert self.record
        return self._raw_bits()

    def values(self) -> Tensor:
        """Kept entries, flat (the 2:4 variant stores them as a matrix)."""
        return self._read(".compressed").flatten()

    def _raw_bits(self) -> Tensor:
        return self._read(".bitmask")

    def _check_offsets(self, counts: Tensor) -> None:
        if self.prefix + ".row_offsets" not in self.where:
            return
        if not torch.equal(self._read(".row_offsets").flatten().long(), counts.cumsum(0) - counts):
            raise CheckpointError(f"tensor {self.prefix}.row_offsets does not agree with the bitmask")

    def _read(self, end: str) -> Tensor:
        return self.where[self.prefix + end].read(self.prefix + end)


def find_legacy(where: Mapping[str, SafeFile]) -> dict[str, LegacyMatrix]:
    """Checkpoint key -> matrix of the old layout, recognised by its three tensors. CheckpointError when halved."""
    found: dict[str, LegacyMatrix] = {}
    for name in where:
        prefix = name.removesuffix(".compressed")
        if prefix == name:
            continue
        for end in (".bitmask", ".shape"):
            if prefix + end not in where:
                raise CheckpointError(f"tensor {prefix + end} is missing beside {name}")
        key = prefix if prefix.endswith(".weight") else f"{prefix}.weight"
        if key in where:
            raise CheckpointError(f"tensor {key} is stored both dense and packed")
        found[key] = LegacyMatrix(key, prefix, where)
    return found
