"""Activation-sparse products: inputs below a threshold are not read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..channel_gemv.dispatch import channel_gemv, transpose
from .case import Case

MUST = {0.5: 1.8, 0.65: 2.5, 0.8: 4.4}  # skipped inputs -> speedup over the fastest dense product


def channel_cases(x: Tensor, weight: Tensor) -> list[Case]:
    """One transposed weight with thresholds that skip exact shares of x."""
    weight_t = transpose(weight)
    return [_case(x, weight, weight_t, share, must) for share, must in MUST.items()]


def _case(x: Tensor, weight: Tensor, weight_t: Tensor, share: float, must: float) -> Case:
    threshold, seen, active = skipping(x, share)
    read = int(active.sum()) * weight.shape[0] * weight.element_size()
    call = lambda: channel_gemv(x, weight_t, threshold)
    return Case(f"activation-sparse {share:.0%}", call, read, seen, weight, must=must)


def skipping(x: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds that skip this share of x [1, cols], x without what they skip, and which inputs are active."""
    size = x.float().abs().flatten()
    skipped = round(share * len(size))
    limit = size.sort().values[skipped - 1].item() if skipped else -1.0
    active = size > limit
    return torch.full_like(size, limit), torch.where(active, x, torch.zeros_like(x)), active
