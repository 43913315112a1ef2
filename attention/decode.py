"""One token's attention over an ordinary cache: the attention function of models on the CPU that run on our kernels.

torch's own takes 0.2 ms for one bfloat16 query of 32 heads over 40 keys of 4 KV heads, 3 ms over 400 (one thread). Read
once, these keys take 0.02 and 0.05 ms. Whatever is not one token without a mask goes to transformers' function.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..kernels.arguments import CODES
from ..kernels.ready import cpu_ready
from ..kernels.window_attention.dispatch import MAX_GROUP, window_attention

NAME = "gossamer_decode"
USUAL = "sdpa"
OTHER = ("position_bias", "softcap", "s_aux", "cache", "output_attentions")  # what only transformers' function knows


def adopt_attention(model: Any) -> None:
    """A model on the CPU with transformers' usual attention gets this one; every other stays as it is.

    What is computed stays the same, up to the order of sums; nothing of it is saved with the model.
    """
    config = model.config.get_text_config(decoder=True)
    if model.device.type != "cpu" or config._attn_implementation != USUAL or not model._can_set_attn_implementation():
        return
    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, q, query heads, D]; query [batch, query heads, q, D], key and value [batch, KV heads, k, D]."""
    if attention_mask is not None or dropout or not _fits(query, key, value, rest):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )  # fmt: skip
    batch, heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    rows = key.shape[0] * key.shape[1] * key.shape[2]
    out = window_attention(
        query.reshape(batch, heads, width).contiguous(),
        key.view(rows, width),
        value.view(rows, width),
        _every_key(batch, key.shape[1], key.shape[2]),
        scale,
    )
    return out.view(batch, 1, heads, width), None


def _fits(query: Tensor, key: Tensor, value: Tensor, rest: dict[str, Any]) -> bool:
    return (
        query.shape[2] == 1
        and query.is_cpu
        and query.dtype in CODES
        and query.dtype is key.dtype is value.dtype
        and key.is_contiguous()
        and value.is_contiguous()
        and key.shape == value.shape
        and key.shape[0] == query.shape[0]
        and key.shape[3] == query.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[1] <= MAX_GROUP * key.shape[1]
        and not any(rest.get(name) is not None for name in OTHER)
        and cpu_ready()
    )


@lru_cache(maxsize=4)
def _every_key(batch: int, kv_heads: int, length: int) -> Tensor:
    """The ranges of `window_attention` for a whole cache [batch, KV heads, length]; all layers of a step share them."""
    ranges = torch.zeros(batch, kv_heads, 4, dtype=torch.int64, device="cpu")
    ranges[..., 0] = torch.arange(batch * kv_heads, device="cpu").view(batch, kv_heads) * length
    ranges[..., 1] = length
    return ranges
