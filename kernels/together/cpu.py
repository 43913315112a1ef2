"""`together` in C++. `dispatch` has checked the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import CODES
from ..tier import Tier


def together(tier: Tier, x: Tensor, cols: int, weights: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    lead = x.shape[:-1]
    results = [x.new_empty((*lead, count)) for count in rows]
    matrices = [
        (weight.data_ptr(), count, weight.dtype is torch.uint8, y.data_ptr())
        for weight, count, y in zip(weights, rows, results, strict=True)
    ]
    batch = lead.numel()
    tier.module.gemv(tier.address, CODES[x.dtype], x.data_ptr(), batch, cols, matrices, torch.get_num_threads())
    return results
