"""The operations of `reference` in C++. `dispatch` has checked the arguments: contiguous CPU tensors that fit."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...errors import KernelError


def pack_bits(module: ModuleType, mask: Tensor) -> Tensor:
    rows, cols = mask.shape
    bits = torch.empty(rows, -(-cols // 8), dtype=torch.uint8)
    module.bitmask_pack(mask.data_ptr(), rows, cols, bits.data_ptr())
    return bits


def unpack_bits(module: ModuleType, bits: Tensor, cols: int) -> Tensor:
    mask = torch.empty(bits.shape[0], cols, dtype=torch.bool)
    module.bitmask_unpack(bits.data_ptr(), bits.shape[0], cols, mask.data_ptr())
    return mask


def row_counts(module: ModuleType, bits: Tensor) -> Tensor:
    counts = torch.empty(bits.shape[0], dtype=torch.int64)
    module.bitmask_row_counts(bits.data_ptr(), *bits.shape, counts.data_ptr())
    return counts


def compress(module: ModuleType, weight: Tensor, bits: Tensor, nnz: int) -> Tensor:
    values = torch.empty(nnz, dtype=weight.dtype)
    rows, cols = weight.shape
    found = module.bitmask_compress(
        weight.data_ptr(), bits.data_ptr(), rows, cols, weight.element_size(), values.data_ptr(), nnz
    )
    _check_count(found, nnz)
    return values


def expand(module: ModuleType, values: Tensor, bits: Tensor, cols: int) -> Tensor:
    rows, nnz = bits.shape[0], values.numel()
    weight = torch.empty(rows, cols, dtype=values.dtype)
    found = module.bitmask_expand(
        values.data_ptr(), bits.data_ptr(), rows, cols, values.element_size(), weight.data_ptr(), nnz
    )
    _check_count(found, nnz)
    return weight


def _check_count(found: int, expected: int) -> None:
    """Another thread changed the bits between the count and the call; nothing was written out of bounds."""
    if found != expected:
        raise KernelError(f"the bits changed during the call: {found} are set, {expected} were counted")
