"""What the GPU kernel needs beside the packed tensor: where each tile begins, so that no tile waits for another.

The CPU walks the stream of a row tile from its begin, tile after tile: the length of one tells where the next begins.
Thousands of GPU threads cannot wait for each other like that. The index is 8 bytes per tile of 512 weights: 1.4 % of a
matrix at half density.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bitmask.reference import row_counts
from ..derived import Derived
from .layout import COLS, MASK_BYTES, ROWS, TAIL, Shape
from .record import Record

START = 27  # bits 27 and up: begin of the tile; bits 0 to 26: three numbers of 9 bits
indices = Derived[Tensor]()


def index_of(packed: Tensor, record: Record) -> Tensor:
    """The index of a packed tensor with that record, on its device; made once, kept while the packed memory lives."""
    return indices.of(record, lambda: make(packed, Shape(record.rows, record.cols)))


def make(packed: Tensor, shape: Shape) -> Tensor:
    """int64 [row tiles, tiles along the columns], of a packed tensor without fault.

    Bits from 27: where the tile begins, in units of 2 bytes from the stream's begin. Bits 0 to 8, 9 to 17, 18 to 26:
    kept values of its row 0, of rows 0 and 1, of rows 0 to 2, so where the values of rows 1, 2 and 3 begin.
    """
    offsets = packed[64 : 64 + 8 * shape.offsets].view(torch.int64)
    stream = packed[shape.stream : len(packed) - TAIL]
    inside = torch.arange(MASK_BYTES, device=packed.device)
    columns = []
    for panel, tiles in enumerate(shape.panels):
        at = offsets[panel * shape.row_tiles : (panel + 1) * shape.row_tiles]
        for _ in range(tiles):
            masks = stream[2 * at[:, None] + inside]
            ends = row_counts(masks.view(-1, COLS // 8)).view(-1, ROWS).cumsum(1)
            columns.append((at << START) | ends[:, 0] | (ends[:, 1] << 9) | (ends[:, 2] << 18))
            at = at + MASK_BYTES // 2 + ends[:, 3]
    if not columns:
        return offsets.new_zeros(shape.row_tiles, 0)
    return torch.stack(columns, 1)
