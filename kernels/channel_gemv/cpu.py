"""`channel_gemv` in C++. `dispatch` has checked the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tier import Tier


def channel_gemv(tier: Tier, x: Tensor, rows: int, weight_t: Tensor, threshold: Tensor, code: int) -> Tensor:
    channels, outputs = weight_t.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    tier.module.channel_gemv(
        tier.address,
        code,
        x.data_ptr(),
        rows,
        weight_t.data_ptr(),
        threshold.data_ptr(),
        channels,
        outputs,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
