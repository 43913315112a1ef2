"""Bit-packed masks in plain torch: this file defines what every other implementation must give, on any device.

A mask of r x c entries takes uint8 [r, ceil(c / 8)]: bit j of byte k of a row stands for column 8k + j (1 = kept), and
the unused high bits of a row's last byte are 0. Values are kept ones in row order. Nothing is computed with them: they
are copied as integers of their width, so NaN payloads and the sign of zero survive.

The arguments are taken as checked; `dispatch` does that.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bits(mask: Tensor) -> Tensor:
    """bool [r, c] -> uint8 [r, ceil(c / 8)]."""
    rows, cols = mask.shape
    width = -(-cols // 8)
    padded = torch.zeros(rows, width * 8, dtype=torch.bool, device=mask.device)
    padded[:, :cols] = mask
    bytes_of = padded.view(torch.uint8).view(rows, width, 8)
    bits = torch.zeros(rows, width, dtype=torch.uint8, device=mask.device)
    for j in range(8):
        bits |= bytes_of[:, :, j] << j
    return bits


def unpack_bits(bits: Tensor, cols: int) -> Tensor:
    """uint8 [r, ceil(cols / 8)] -> bool [r, cols]."""
    rows, width = bits.shape
    mask = torch.empty(rows, width, 8, dtype=torch.bool, device=bits.device)
    for j in range(8):
        mask[:, :, j] = (bits >> j) & 1
    return mask.view(rows, width * 8)[:, :cols].contiguous()


def row_counts(bits: Tensor) -> Tensor:
    """Set bits of each row, int64 [r]."""
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(1, dtype=torch.int64)


def compress(weight: Tensor, bits: Tensor) -> Tensor:
    """The entries of weight [r, c] whose bit is set, [nnz], row after row."""
    kept = unpack_bits(bits, weight.shape[1])
    integers = weight.contiguous().view(_AS_INTEGER[weight.element_size()])
    return integers.masked_select(kept).view(weight.dtype)


def expand(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    """weight [r, cols] with `values` where bits are set and +0.0 elsewhere."""
    kept = unpack_bits(bits, cols)
    integers = values.contiguous().view(_AS_INTEGER[values.element_size()])
    weight = torch.zeros(kept.shape, dtype=integers.dtype, device=values.device)
    return weight.masked_scatter_(kept, integers).view(values.dtype)
