"""The results of `window_attention` and `window_step` in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def window_attention(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the rows of two ranges, in float32, rounded once to the query's dtype.

    query [batch, query heads, D], keys and values [rows, D], ranges int64 [batch, KV heads, 4].
    """
    batch, heads, width = query.shape
    kv_heads = ranges.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, width).float()
    out = query.new_zeros(grouped.shape, dtype=torch.float32)
    for b, row in enumerate(ranges.tolist()):
        for h, (first, count, second, more) in enumerate(row):
            if count + more:
                key, value = (
                    torch.cat([part[first : first + count], part[second : second + more]]).float()
                    for part in (keys, values)
                )
                out[b, h] = torch.softmax(grouped[b, h] @ key.t() * scale, -1) @ value
    return out.view(batch, heads, width).to(query.dtype)


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """keys[slots] = key, values[slots] = value: new rows [batch, KV heads, D], slots int64 [batch, KV heads]."""
    places, width = slots.reshape(-1), keys.shape[1]
    keys.index_copy_(0, places, key.reshape(-1, width))
    values.index_copy_(0, places, value.reshape(-1, width))
