"""`dense_gemv` in C++. `dispatch` has checked the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tier import Tier


def dense_gemv(tier: Tier, x: Tensor, rows: int, weight: Tensor, code: int) -> Tensor:
    outputs, cols = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    threads = torch.get_num_threads()
    matrices = [(weight.data_ptr(), outputs, False, y.data_ptr())]
    tier.module.gemv(tier.address, code, x.data_ptr(), rows, cols, matrices, threads)
    return y
