"""A model's attention, observed: what planning looks through.

One attention function is registered with transformers. Inside `observing`, it computes what the model's own does and
hands every layer's tensors to a callback. Sequences have no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import ModelError

NAME = "gossamer_observed"

# layer, query [batch, query heads, N, D], key and value [batch, KV heads, N, D], output [batch, query heads, N, D],
# the model's mask: bool [batch, 1, N, N]; scale of q k^T
Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor, float], None]


@dataclass
class _State:
    observer: Observer
    layers: set[int]


_STATE: ContextVar[_State | None] = ContextVar("observed attention", default=None)


@contextmanager
def observing(model: Any, observer: Observer) -> Iterator[set[int]]:
    """Inside, forward passes of `model` (use_cache=False, no padding) run as described above.

    Gives the set of layers seen so far. ModelError for a model whose attention cannot be replaced.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    state = _State(observer, set())
    token = _STATE.set(state)
    try:
        model.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise ModelError(f"the attention of {type(model).__name__} cannot be observed, so no head plan can be made")
        yield state.layers
    finally:
        _STATE.reset(token)
        model.set_attn_implementation(before)


def _mask(*arguments: Any, **named: Any) -> Tensor | None:
    named |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*arguments, **named)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    state, layer = _STATE.get(), getattr(module, "layer_idx", None)
    for name in ("softcap", "s_aux", "position_bias"):
        if rest.get(name) is not None:
            raise ModelError(f"head plans cannot be combined with {name} of this model's attention")
    if state is None or layer is None or attention_mask is None or attention_mask.dtype != torch.bool:
        raise ModelError(f"the attention of {type(module).__name__} cannot be observed, so no head plan can be made")
    state.layers.add(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = scaled_dot_product_attention(query, key, value, attention_mask, scale=scale, enable_gqa=True)
    state.observer(layer, query, key, value, out, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None
