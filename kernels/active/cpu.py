"""`active_gemv` in C++. `dispatch` has checked the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import CODES
from ..tier import Tier


def active_gemv(
    tier: Tier,
    x: Tensor,
    threshold: Tensor,
    weights: Sequence[Tensor],
    outputs: Sequence[int],
    biases: Sequence[Tensor | None],
    center: Tensor | None = None,
) -> tuple[list[Tensor], int]:
    """The products, and how many inputs were read."""
    lead = x.shape[:-1]
    results = [x.new_empty((*lead, count)) for count in outputs]
    matrices = [
        (
            weight.data_ptr(),
            y.shape[-1],
            weight.dtype is torch.uint8,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
        )
        for weight, bias, y in zip(weights, biases, results, strict=True)
    ]
    threads, code, batch = torch.get_num_threads(), CODES[x.dtype], lead.numel()
    middle = 0 if center is None else center.data_ptr()
    inputs, limits = x.data_ptr(), threshold.data_ptr()
    read = tier.module.active_gemv(tier.address, code, inputs, batch, x.shape[-1], limits, middle, matrices, threads)
    return results, read
