"""Packing and `bitmask_gemv` in C++. `dispatch` has checked the arguments."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...errors import KernelError
from ..memory import empty_weight
from ..tier import Tier
from .layout import CODES
from .record import Record


def pack(module: ModuleType, bits: Tensor, values: Tensor, cols: int, scales: Tensor | None = None) -> Tensor:
    rows, nnz, code = bits.shape[0], values.numel(), CODES[values.dtype]
    packed = empty_weight(module.tiles_size(rows, cols, nnz, code), dtype=torch.uint8)
    factors = 0 if scales is None else scales.data_ptr()
    if not module.tiles_pack(bits.data_ptr(), values.data_ptr(), factors, nnz, rows, cols, code, packed.data_ptr()):
        raise KernelError("the bits changed during the call")
    return packed


def unpack(
    module: ModuleType, packed: Tensor, rows: int, cols: int, nnz: int, dtype: torch.dtype, groups: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits, values and, for int8 values, scales [rows, groups]."""
    bits = torch.zeros(rows, -(-cols // 8), dtype=torch.uint8)
    values = torch.empty(nnz, dtype=dtype)
    scales = torch.empty(rows, groups, dtype=torch.float16)
    module.tiles_unpack(packed.data_ptr(), bits.data_ptr(), values.data_ptr(), scales.data_ptr())
    return bits, values, scales


def dense(tier: Tier, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(rows, cols, dtype=dtype)
    tier.module.bitmask_expand_tiles(tier.address, packed.data_ptr(), weight.data_ptr(), torch.get_num_threads())
    return weight


def bitmask_gemv(tier: Tier, x: Tensor, batch: int, packed: Tensor, record: Record) -> Tensor:
    y = x.new_empty((*x.shape[:-1], record.rows))
    matrices = [(packed.data_ptr(), record.rows, True, y.data_ptr())]
    threads = torch.get_num_threads()
    tier.module.gemv(tier.address, CODES[record.dtype], x.data_ptr(), batch, record.cols, matrices, threads)
    return y
