"""Packing and expanding in C++. `dispatch` has checked the arguments."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...errors import KernelError
from ..memory import empty_weight
from ..tier import Tier
from .layout import CODES


def pack(module: ModuleType, bits: Tensor, values: Tensor, cols: int) -> Tensor:
    rows, nnz = bits.shape[0], values.numel()
    packed = empty_weight(module.dual_size(rows, cols, nnz), dtype=torch.uint8)
    arguments = (bits.data_ptr(), values.data_ptr(), nnz, rows, cols, CODES[values.dtype], packed.data_ptr())
    if not module.dual_pack(*arguments):
        raise KernelError("the bits changed during the call")
    return packed


def unpack(
    module: ModuleType, packed: Tensor, rows: int, cols: int, nnz: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    bits = torch.zeros(rows, -(-cols // 8), dtype=torch.uint8)
    values = torch.empty(nnz, dtype=dtype)
    module.dual_unpack(packed.data_ptr(), bits.data_ptr(), values.data_ptr())
    return bits, values


def dense_t(tier: Tier, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix transposed, [cols, rows]."""
    weight_t = torch.empty(cols, rows, dtype=dtype)
    tier.module.dual_expand(tier.address, packed.data_ptr(), weight_t.data_ptr(), torch.get_num_threads())
    return weight_t
