"""`int8_gemv` in C++. `dispatch` has checked the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import CODES
from ..tier import Tier


def int8_gemv(tier: Tier, x: Tensor, batch: int, packed: Tensor, rows: int) -> Tensor:
    y = x.new_empty((*x.shape[:-1], rows))
    threads = torch.get_num_threads()
    tier.module.int8_gemv(tier.address, CODES[x.dtype], x.data_ptr(), batch, packed.data_ptr(), y.data_ptr(), threads)
    return y
