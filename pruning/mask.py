"""The mask of one matrix as an explicit, bit-packed object. It is never inferred from zeros in a weight."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.bitmask.dispatch import pack_bits, row_counts, unpack_bits


@dataclass(frozen=True, eq=False)
class Mask:
    """Which entries of a [rows, cols] matrix are kept.

    Attributes:
        bits: uint8 [rows, ceil(cols / 8)]; bit j of byte k stands for column 8k + j (1 = kept), tail bits are 0.
        cols: number of columns.
        pattern: the pattern that made it, as `str(pattern)`.
    """

    bits: Tensor
    cols: int
    pattern: str

    def __post_init__(self) -> None:
        if self.bits.dtype != torch.uint8 or self.bits.dim() != 2 or self.bits.shape[1] != -(-self.cols // 8):
            raise ValueError(
                f"bits must be uint8 [rows, {-(-self.cols // 8)}] for {self.cols} columns, "
                f"got {self.bits.dtype} {list(self.bits.shape)}"
            )

    @classmethod
    def from_bool(cls, keep: Tensor, pattern: str) -> Mask:
        """From bool [rows, cols], True = kept."""
        return cls(pack_bits(keep), keep.shape[1], pattern)

    def to_bool(self) -> Tensor:
        """bool [rows, cols], True = kept."""
        return unpack_bits(self.bits, self.cols)

    @property
    def shape(self) -> tuple[int, int]:
        return self.bits.shape[0], self.cols

    @property
    def zeros(self) -> int:
        """Number of pruned entries."""
        return self.bits.shape[0] * self.cols - int(row_counts(self.bits).sum())

    def sha256(self) -> str:
        """Digest of the bits, row by row. The shape is recorded beside it wherever it is stored."""
        return hashlib.sha256(self.bits.cpu().contiguous().numpy().tobytes()).hexdigest()

    def apply(self, weight: Tensor) -> Tensor:
        """A copy of `weight` with +0.0 at every pruned entry; kept entries bit for bit."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the mask is {list(self.shape)}, the weight {list(weight.shape)}")
        return weight.masked_fill(~self.to_bool().to(weight.device), 0.0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (self.cols, self.pattern) == (other.cols, other.pattern) and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]
