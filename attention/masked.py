"""Attention with one mask per KV head, in plain torch: what every other way of running a head plan must equal."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def masked_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T, over the keys seen) v.

    Args:
        query: [batch, query heads, q, D]; query head h reads KV head h // (query heads / KV heads).
        key, value: [batch, KV heads, k, D].
        seen: bool [batch or 1, KV heads, q, k]; a query that sees nothing gets zeros.
        scale: D ** -0.5 where not given.

    Returns:
        [batch, query heads, q, D], in the query's dtype.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    nothing = ~seen.any(-1, keepdim=True)
    mask = (seen | nothing).repeat(1, 1, group, 1)
    # The heads of a group become further queries of their KV head, so that keys are not repeated.
    folded = query.reshape(batch, kv_heads, group * length, width)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.masked_fill(nothing.repeat(1, 1, group, 1), 0.0).view(batch, heads, length, value.shape[-1])
