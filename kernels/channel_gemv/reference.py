"""The result of `channel_gemv` in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def active(x: Tensor, threshold: Tensor) -> Tensor:
    """bool like x [..., in]: which inputs count. Written as `not <=`, so that NaN counts and reaches the result."""
    return ~(x.float().abs() <= threshold)


def channel_gemv(x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], zero where not active, times weight_t [in, out]; plus bias; all in float32, rounded once.

    Channels that no row needs are not read: what they hold, infinities and NaN included, cannot reach the result.
    """
    rows = x.float().reshape(x.shape[:-1].numel(), x.shape[-1])
    mask = active(rows, threshold)
    needed = mask.any(0).nonzero().squeeze(1)
    kept = torch.where(mask, rows, rows.new_zeros(()))[:, needed]
    sums = kept @ weight_t[needed].float()
    sums = sums if bias is None else sums + bias.float()
    return sums.to(x.dtype).reshape(*x.shape[:-1], weight_t.shape[1])
