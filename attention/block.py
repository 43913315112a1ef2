"""One token through an attention block of the Llama kind: what its `forward` computes, in half as many operations.

For one token the Python of a block, its rotation and its views cost more than attention over some hundred keys. Blocks
whose forward is known to the letter get one that computes the same, bit for bit, for one token on the CPU with a ragged
cache, or with another and our attention function (decode.py); everything else goes to their own. Query and key are
rotated in one piece: with halves swapped and the signs of rotate_half in the sine,

    x cos + rotate_half(x) sin = x cos + swap(x) (-sin_1, sin_2)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .alike import alike
from .decode import NAME, decode_attention
from .mask import HeadMask
from .ragged import RaggedCache
from .raggedlayer import RaggedLayer
from .shared import Rotation

ROTATE = "apply_rotary_pos_emb"
_last = Rotation()  # of the step that a model is at


def shorten(module: nn.Module) -> None:
    """Gives a block the short way where its forward is known; others, and those with a forward of their own, stay."""
    kind: Any = type(module)
    if "forward" not in module.__dict__ and _known(kind):
        object.__setattr__(module, "forward", partial(_forward, module))  # unlike a bound method it can be pickled


def shortened(module: nn.Module) -> bool:
    """Whether a block has the short way: then it computes what is said above."""
    return getattr(module.__dict__.get("forward"), "func", None) is _forward


def restore(module: nn.Module) -> None:
    """Takes the short way away."""
    if shortened(module):
        del module.__dict__["forward"]


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    layer = _layer(self, hidden_states, position_embeddings, attention_mask, past_key_values)
    if layer is None and not _ordinary(self, hidden_states, position_embeddings, attention_mask, past_key_values):
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
    query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
    value = self.v_proj(hidden_states)
    batch, width = query.shape[0], self.head_dim
    rotation = _last if layer is None else layer.shared.rotation
    cos, sin = rotation(*position_embeddings)
    both = torch.cat([query, key], 2).view(batch, -1, width)
    turned = both * cos + both.view(batch, -1, 2, width // 2).flip(2).view(both.shape) * sin
    heads = query.shape[2] // width
    if layer is None:
        new = (turned[:, heads:, None], value.view(batch, -1, 1, width))
        keys, values = past_key_values.update(*new, self.layer_idx)
        out, _ = decode_attention(self, turned[:, :heads, None], keys, values, None, scaling=self.scaling, **kwargs)
        return self.o_proj(out.view(batch, 1, -1)), None
    out = layer.take_one(
        turned[:, :heads].contiguous(), turned[:, heads:].contiguous(), value.view(batch, -1, width), self.scaling,
        attention_mask.reach,
    )  # fmt: skip
    return self.o_proj(out.view(batch, 1, -1)), None


def _layer(module: Any, hidden: Tensor, rotation: Any, mask: Any, past: Any) -> RaggedLayer | None:
    """The layer that takes this token; None where the block's own forward has to see to it."""
    if (
        not isinstance(past, RaggedCache)
        or not isinstance(mask, HeadMask)
        or mask.other is not None
        or mask.new_tokens is not None
        or not _one_token(module, hidden, rotation)
    ):
        return None
    layer = past.layers[module.layer_idx]
    fits = (
        layer.store is not None
        and layer.pending is None
        and layer.store.keys.dtype is hidden.dtype
        and layer.quick(hidden.dtype)
    )
    return layer if fits else None


def _ordinary(module: Any, hidden: Tensor, rotation: Any, mask: Any, past: Any) -> bool:
    """Whether a cache of transformers takes this token, and our attention function follows."""
    return (
        mask is None
        and isinstance(past, Cache)
        and not isinstance(past, RaggedCache)
        and module.config._attn_implementation == NAME
        and not module.training
        and _one_token(module, hidden, rotation)
    )


def _one_token(module: Any, hidden: Tensor, rotation: Any) -> bool:
    return (
        hidden.shape[1] == 1
        and hidden.is_cpu
        and rotation[0].dtype is hidden.dtype
        and rotation[0].shape[-1] == module.head_dim
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _known(kind: Any) -> bool:
    """Whether a class has the forward, and the rotation, of a block that `_forward` stands for."""
    if not any(alike(kind.forward, theirs) for theirs in _blocks()):
        return False
    from transformers.models.llama import modeling_llama

    rotate = inspect.unwrap(kind.forward).__globals__.get(ROTATE)
    return rotate is not None and alike(rotate, modeling_llama.apply_rotary_pos_emb) and _rotates(rotate)


def _blocks() -> list[Callable[..., Any]]:
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2 import modeling_qwen2

    kinds = (modeling_llama.LlamaAttention, modeling_mistral.MistralAttention, modeling_qwen2.Qwen2Attention)
    return [kind.forward for kind in kinds if _ours(kind.forward)]


def _ours(forward: Callable[..., Any]) -> bool:
    """Whether transformers' own block is still the one that `_forward` was written for, by the names it uses."""
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "update", "scaling", ROTATE, "get_interface"}
    wanted = names | {
        "shape", "head_dim", "view", "transpose", "layer_idx", "config", "_attn_implementation", "reshape",
        "contiguous", "training", "attention_dropout", "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward",
    }  # fmt: skip
    found = set(inspect.unwrap(forward).__code__.co_names)
    return names <= found <= wanted | {"sliding_window", "getattr"}


def _rotates(rotate: Callable[..., Any]) -> bool:
    """Whether the rotation is the one written above, tried out."""
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(1, 1, 1, 8, generator=generator) for _ in range(3))
    swapped = x.view(1, 1, 1, 2, 4).flip(3).view(x.shape)
    wanted = x * cos + swapped * torch.cat([-sin[..., :4], sin[..., 4:]], -1)
    return torch.equal(rotate(x, x, cos[0], sin[0])[0], wanted)
