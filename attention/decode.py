"""One token's attention over an ordinary cache: the attention function of models on the CPU that run on our kernels.

torch's own takes 0.2 ms for one bfloat16 query of 32 heads over 40 keys of 4 KV heads, 3 ms over 400 (one thread). Read
once, these keys take 0.02 and 0.05 ms. Whatever is not one token without a mask goes to transformers' function.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..kernels.arguments import CODES
from ..kernels.ready import cpu_ready
from ..kernels.window_attention.dispatch import MAX_GROUP, window_attention
from .filled import every_key

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
    capacity = _capacity(key)
    rows = (batch * key.shape[1] - 1) * capacity + key.shape[2]
    out = window_attention(
        query.reshape(batch, heads, width).contiguous(),
        key.as_strided((rows, width), (width, 1)),
        value.as_strided((rows, width), (width, 1)),
        _every_key(batch, key.shape[1], key.shape[2], capacity),
        scale,
    )
    return out.view(batch, 1, heads, width), None


def _fits(query: Tensor, key: Tensor, value: Tensor, rest: dict[str, Any]) -> bool:
    return (
        query.shape[2] == 1
        and query.is_cpu
        and query.dtype in CODES
        and query.dtype is key.dtype is value.dtype
        and key.shape == value.shape
        and _capacity(key) == _capacity(value) > 0
        and key.shape[0] == query.shape[0]
        and key.shape[3] == query.shape[3]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[1] <= MAX_GROUP * key.shape[1]
        and not any(rest.get(name) is not None for name in OTHER)
        and cpu_ready()
    )


def _capacity(cache: Tensor) -> int:
    """Rows from one head of [batch, KV heads, k, D] to the next, where rows lie side by side; 0 for another order."""
    batch, heads, length, width = cache.shape
    far, near, row, one = cache.stride()
    if not cache.numel() or one != 1 or (row != width and length > 1):
        return 0
    capacity = near // width if heads > 1 else far // width if batch > 1 else length
    fits = (heads == 1 or near == capacity * width) and (batch == 1 or far == heads * capacity * width)
    return capacity if fits and capacity >= length else 0


_every_key = lru_cache(maxsize=4)(every_key)  # all layers of a step share them
