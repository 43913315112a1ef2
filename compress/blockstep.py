"""One token through a decoder block of the Llama kind in two calls of compiled code, attention and the MLP, or one.

For one token the Python around a block's products takes 0.5 ms, a third of the products themselves in a model of a
billion weights: interpreter and torch have left the caches while weights ran through them. Blocks whose code is known
to the letter (Llama, Mistral, Qwen2) get a forward that hands addresses to csrc/step.cpp instead. What each call looks
at first: that modules and tensors are those it was prepared for (watch.py), and that nobody counts, hooks, compiles, or
wants a gradient. Whatever is not as expected goes through the modules themselves, each half on its own. Behind a block
that went this way the next one takes a single call (blockturn.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.alike import alike
from ..attention.filled import Place
from ..kernels.arguments import CODES, MAX_ROWS
from ..kernels.modules.counting import counts
from ..kernels.modules.sparse_linear import dense_only
from ..kernels.modules.watch import globally_hooked
from ..kernels.ready import cpu_ready
from .blockhalves import AttentionPart, FeedPart
from .blockturn import Turn, layer_of, leave, turn_of

KNOWN_WORDS = {"position_ids", "use_cache", "cache_position"}  # nothing that the halves compute depends on them


def shorten_block(module: nn.Module) -> None:
    """Gives a block the short way where its forward is known; others, and those with a forward of their own, stay."""
    kind: Any = type(module)
    if "forward" not in module.__dict__ and _known(kind):
        object.__setattr__(module, "forward", partial(_forward, module))  # unlike a bound method it can be pickled
        module._gossamer_halves = Halves()  # type: ignore[assignment]


class Halves:
    """What was prepared for a block. Copies of a block start without."""

    def __init__(self) -> None:
        self.attention: AttentionPart | None = None
        self.feed: FeedPart | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Halves:
        return Halves()

    def __reduce__(self) -> tuple[type[Halves], tuple[()]]:
        return Halves, ()


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    halves: Halves = self._gossamer_halves
    asks = bool(kwargs) and any(value is not None for name, value in kwargs.items() if name not in KNOWN_WORDS)
    if not asks:
        done = _whole(self, halves, hidden_states, attention_mask, past_key_values, position_embeddings)
        if done is not None:
            return done
    if not _one_token(self, hidden_states):
        return type(self).forward(
            self, hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
        )
    place = attended = None
    if not asks:
        attended, place = _attended(self, halves, hidden_states, attention_mask, past_key_values, position_embeddings)
    if attended is None:
        made, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        attended = hidden_states + made
    fed = _fed(self, halves, attended)
    if fed is None:
        return attended + self.mlp(self.post_attention_layernorm(attended))
    if place is not None and halves.attention is not None:
        config = self.self_attn.config
        leave(past_key_values, Turn(halves.attention, position_embeddings, attention_mask, config, place, fed))
    return fed


def _one_token(block: Any, x: Tensor) -> bool:
    return (
        x.dim() == 3
        and x.shape[1] == 1
        and 1 <= x.shape[0] <= MAX_ROWS
        and x.is_cpu
        and x.dtype in CODES
        and x.is_contiguous()
        and not block.training
        and cpu_ready()
        and not torch.is_autocast_enabled("cpu")
        and not dense_only()
        and counts() is None
        and not globally_hooked()
    )


def _whole(block: Any, halves: Halves, x: Tensor, mask: Any, past: Any, rotation: Any) -> Tensor | None:
    first, second, turn = halves.attention, halves.feed, turn_of(past)
    if turn is None or turn.x is not x or turn.rotation is not rotation or turn.mask is not mask:
        return None
    return None if first is None or second is None else turn.through(block, first, second, past)


def _attended(
    block: Any, halves: Halves, x: Tensor, mask: Any, past: Any, rotation: Any
) -> tuple[Tensor, Place] | tuple[None, None]:
    """With the place of the token in its cache."""
    part = halves.attention
    if part is None or not part.watch.same() or part.dtype is not x.dtype:
        part = halves.attention = AttentionPart(block, x.dtype)
    if part.compiled is None or rotation is None or not part.turns(rotation, x):
        return None, None
    layer = layer_of(block.self_attn, past, mask, part.index, x.dtype)
    if layer is None:
        return None, None
    place: Place | None = layer.place_one(getattr(mask, "reach", None))
    if place is None or not part.fits(place, x.shape[0]):
        return None, None
    y = part.run(x, rotation, place)
    if y is None:
        return None, None
    layer.placed_one()
    return y, place


def _fed(block: Any, halves: Halves, x: Tensor) -> Tensor | None:
    part = halves.feed
    if part is None or not part.watch.same() or part.dtype is not x.dtype:
        part = halves.feed = FeedPart(block, x.dtype)
    return None if part.compiled is None else part.run(x)


@cache
def _known(kind: Any) -> bool:
    """Whether a class has the forward of a block that `_forward` stands for."""
    return any(alike(kind.forward, theirs) for theirs in _blocks())


def _blocks() -> list[Callable[..., Any]]:
    from transformers.models.llama import modeling_llama

    kinds = [modeling_llama.LlamaDecoderLayer]
    return [kind.forward for kind in kinds if set(unwrap(kind.forward).__code__.co_names) == _NAMES]


_NAMES = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
