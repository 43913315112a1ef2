"""`window_attention` and `window_step` in C++. `dispatch` has checked the arguments, except the ranges and slots."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tier import Tier


def window_attention(
    tier: Tier, query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float, code: int
) -> Tensor | None:
    """None when a range reaches beyond the rows."""
    return _call(tier, query, 0, 0, keys, values, 0, ranges, scale, code)


def window_step(
    tier: Tier,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    ranges: Tensor,
    scale: float,
    code: int,
) -> Tensor | None:
    """None, and nothing stored, when a slot or a range reaches beyond the rows."""
    return _call(
        tier, query, key.data_ptr(), value.data_ptr(), keys, values, slots.data_ptr(), ranges, scale, code
    )  # fmt: skip


def _call(
    tier: Tier,
    query: Tensor,
    key: int,
    value: int,
    keys: Tensor,
    values: Tensor,
    slots: int,
    ranges: Tensor,
    scale: float,
    code: int,
) -> Tensor | None:
    batch, heads, width = query.shape
    out = query.new_empty(query.shape)
    done = tier.module.window_attention(
        tier.address,
        code,
        query.data_ptr(),
        (key, value, slots),
        keys.data_ptr(),
        values.data_ptr(),
        ranges.data_ptr(),
        (batch, ranges.shape[1], heads // ranges.shape[1], width, keys.shape[0]),
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out if done else None
