"""The matrix of `dual_gemv` for GPUs: channel by channel, in words of 64 outputs that stand for themselves.

masks int64 [in, words]: bit j of word w is output 64 w + j. starts int32 [in, words]: where the values of that word
begin in values [nnz], which are in the order of channels, then of outputs. A skipped channel skips words and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...errors import KernelError
from ..bitmask import dispatch as bitmask
from ..derived import Derived

if TYPE_CHECKING:
    from ..record import Record

WORD = 64


class DualMatrix(NamedTuple):
    masks: Tensor
    starts: Tensor
    values: Tensor


matrices = Derived[DualMatrix]()


def matrix_of(packed: Tensor, record: Record, unpack: Callable[[Tensor], tuple[Tensor, Tensor, int]]) -> DualMatrix:
    """Of a packed tensor with that record, on its device; `unpack` gives its bits, values and columns on the CPU."""

    def build() -> DualMatrix:
        return DualMatrix(*(part.to(packed.device) for part in make(*unpack(packed))))

    return matrices.of(record, build)


def make(bits: Tensor, values: Tensor, cols: int) -> DualMatrix:
    """From row bits uint8 [rows, ceil(cols / 8)] and values [nnz] in row order, the layout of checkpoints."""
    if values.numel() >= 1 << 31:
        raise KernelError(f"the matrix has {values.numel()} values, fewer than {1 << 31} are allowed")
    bitmask.check_values(values, bits, cols)
    mask = bitmask.unpack_bits(bits, cols).t().contiguous()
    weight = bitmask.expand(values, bits, cols).t().contiguous()
    words = -(-bits.shape[0] // WORD)
    padded = torch.zeros(cols, 8 * words, dtype=torch.uint8, device=bits.device)
    transposed = bitmask.pack_bits(mask)
    padded[:, : transposed.shape[1]] = transposed
    padded = padded.view(cols * words, 8)
    counts = bitmask.row_counts(padded)
    starts = (counts.cumsum(0) - counts).to(torch.int32).view(cols, words)
    return DualMatrix(padded.view(torch.int64).view(cols, words), starts, bitmask.compress(weight, transposed))
