"""`window_attention` on CUDA GPUs by torch's flash attention for sequences of several lengths.

Every range of every KV head is one sequence of keys with one KV head, and the query heads that share it are its heads.
A head's two ranges are merged by their log-sum-exp. `dispatch` has checked the arguments, except the ranges: that would
wait for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

WIDEST = 256


def fits(query: Tensor) -> bool:
    """Whether flash attention takes a query's dtype and width."""
    return query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] % 8 == 0 and query.shape[2] <= WIDEST


def window_attention(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float) -> Tensor:
    batch, heads, width = query.shape
    kv_heads = ranges.shape[1]
    sequences, group = 2 * batch * kv_heads, heads // kv_heads
    begins, counts = ranges.view(-1, 2).int().unbind(1)
    twice = query.view(batch * kv_heads, 1, group, width).expand(-1, 2, -1, -1).reshape(sequences, group, width)
    ends = begins.new_full((1,), keys.shape[0])
    parts, lse = varlen_attn(
        twice,
        keys.unsqueeze(1),
        values.unsqueeze(1),
        torch.arange(sequences + 1, dtype=torch.int32, device=query.device),
        torch.cat([begins, ends]),
        1,
        keys.shape[0],
        return_aux=AuxRequest(lse=True),
        scale=scale,
        enable_gqa=group > 1,
        seqused_k=counts.contiguous(),
    )
    return merge(parts, lse, counts).view(batch, heads, width)


def merge(parts: Tensor, lse: Tensor, counts: Tensor) -> Tensor:
    """Attention over both ranges of every head from that over each.

    parts [2 n, group, D], lse [2 n, group], counts [2 n] keys of each; [n, group, D]. A range without keys has no
    weight, and two of them give zeros.
    """
    weights = lse.float().masked_fill((counts == 0)[:, None], float("-inf")).unflatten(0, (-1, 2))
    shares = torch.softmax(weights, 1).nan_to_num(0.0).unsqueeze(-1)
    filled = parts.float().masked_fill((counts == 0)[:, None, None], 0.0).unflatten(0, (-1, 2))
    return (filled * shares).sum(1).to(parts.dtype)
