"""The attention function that transformers calls by name once a plan is applied to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..errors import ModelError
from .mask import HeadMask, head_mask
from .masked import masked_attention
from .plan import HeadPlan
from .raggedlayer import MARK, Held, RaggedLayer

NAME = "gossamer_heads"


@dataclass(frozen=True)
class HeadsOfLayer:
    """What an attention module must know of its plan, as its attribute `gossamer_heads`."""

    plan: HeadPlan
    layer: int


def head_attention(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: HeadMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention [batch, q, query heads, D] as the plan of `module` says, over a ragged cache or over all keys.

    query [batch, query heads, q, D]. key and value: [batch, KV heads, k, D], or what a ragged cache has given.
    ModelError for what a plan cannot be combined with.
    """
    heads: HeadsOfLayer | None = getattr(module, NAME, None)
    if heads is None:
        raise ModelError(f"a {type(module).__name__} has no head plan", hint="use gossamer.compress.heads.apply")
    for name in ("softcap", "s_aux", "position_bias"):
        if rest.get(name) is not None:
            raise ModelError(f"head plans cannot be combined with {name} of this model's attention")
    layer = _ragged_layer(key, value)
    mask = attention_mask
    if not isinstance(mask, HeadMask):
        mask = _mask_around(mask, query, key if layer is None else None)
    mask.check_positions(rest.get("position_ids"))
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if layer is not None:
        out = layer.attend(query, mask, scale)
    else:
        if key.shape[1] != heads.plan.kv_heads:
            raise ModelError(f"the model has {key.shape[1]} KV heads, its head plan {heads.plan.kv_heads}")
        seen = mask.visible(heads.plan, heads.layer)
        out = masked_attention(query, key, value, seen, scale)
    return out.transpose(1, 2).contiguous(), None


def _ragged_layer(key: Any, value: Any) -> RaggedLayer | None:
    """The layer behind what `update` gave; None for keys of another cache, changed ones, or ones that layers share."""
    if isinstance(key, Held):
        return key.layer
    layer: object = getattr(key, MARK, None)
    same: bool = getattr(value, MARK, None) is layer
    if not isinstance(layer, RaggedLayer) or not same:
        return None
    if layer.pending is None:  # they were taken: by a layer that computed them, and this one reads them again
        layer.share(key, value)
        return None
    return layer


def _mask_around(mask: Tensor | None, query: Tensor, key: Tensor | None) -> HeadMask:
    """For a mask that somebody made beforehand: bool or additive [batch, 1, q, k]."""
    if mask is None or key is None:
        raise ModelError(
            "the attention function got no mask of its own",
            hint="pass attention_mask as [batch, tokens], or apply the plan with cache='masked'",
        )
    batch, length = query.shape[0], query.shape[2]
    seen = mask if not mask.is_floating_point() else mask > -1e4
    return HeadMask(batch, length, key.shape[2], key.shape[2] - length, 0, query.device, other=seen.bool())


# When this module is imported, so that torch.load of a whole model finds them too.
AttentionInterface.register(NAME, head_attention)
AttentionMaskInterface.register(NAME, head_mask)
