"""From block to block: one call of compiled code where a token comes straight from the block before.

What a token brings along is the same for all blocks: its shape, cosines and sines, mask, the state of the thread. The
first block looks at it, half by half (blockstep.py), and leaves a `Turn` with the cache. A block that is given the very
tensor that the one before returned looks at its own modules and its own memory, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.decode import NAME as DECODE
from ..attention.filled import FilledCache, Place
from ..attention.mask import HeadMask
from ..attention.ragged import RaggedCache
from ..kernels.modules.step import current_step
from .blockhalves import AttentionPart, FeedPart, held, turned

_ATTRIBUTE = "_gossamer_turn"


class Turn:
    """A token of every sequence that a block has been through, in a cache; `x`: what the last block returned."""

    def __init__(self, part: AttentionPart, rotation: Any, mask: Any, config: Any, place: Place, x: Tensor) -> None:
        self.like, self.rotation, self.mask, self.config = part.like, rotation, mask, config
        self.slots, self.ranges = place.slots, place.ranges
        self.turned, self.threads = turned(rotation), torch.get_num_threads()
        self.dense, self.batch, self.x = current_step().dense, x.shape[0], x

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies of a cache start without

    def through(self, block: Any, first: AttentionPart, second: FeedPart, past: Any) -> Tensor | None:
        """x + attention, and that + MLP, of the next block; None, and nothing counted, where its halves have to."""
        if first.compiled is None or second.compiled is None or first.like != self.like or not first.current():
            return None
        if (self.dense and (first.skips or second.skips)) or not (first.watch.same() and second.watch.same()):
            return None
        place, active = self._place(block.self_attn, first, past), second.neurons(self.batch)
        if place is None or active is None:
            return None
        assert first.tier is not None
        y, (layer, where) = torch.empty_like(self.x), place
        done = first.tier.module.whole(
            first.tier.address, first.compiled, second.compiled, self.x.data_ptr(), self.batch, self.turned,
            held(where), *active, y.data_ptr(), self.threads,
        )  # fmt: skip
        if not done:
            return None
        layer.placed_one()
        self.x = y
        return y

    def _place(self, attention: Any, part: AttentionPart, past: Any) -> tuple[Any, Place] | None:
        """The block's layer of the cache, and where in it the token goes."""
        layer = past.layers[part.index]
        if attention.config is not self.config or not (type(past) is FilledCache or _begun(layer)):
            return None
        place = layer.place_one(getattr(self.mask, "reach", None))
        if place is None or not part.stores(place.rows):
            return None
        as_before = place.slots is self.slots and place.ranges is self.ranges
        return (layer, place) if as_before or part.fits(place, self.batch) else None


def turn_of(past: Any) -> Turn | None:
    """The last one through a cache."""
    return getattr(past, _ATTRIBUTE, None)


def leave(past: Any, turn: Turn) -> None:
    """`turn` is the last one through a cache now."""
    setattr(past, _ATTRIBUTE, turn)


def layer_of(attention: Any, past: Any, mask: Any, index: int, dtype: torch.dtype) -> Any:
    """The layer of a cache that can say where the token goes; None for others, and for other attention functions."""
    if type(past) is FilledCache:
        return past.layers[index] if mask is None and attention.config._attn_implementation == DECODE else None
    if type(past) is not RaggedCache or type(mask) is not HeadMask or mask.other is not None:
        return None
    if mask.new_tokens is not None:
        return None
    layer = past.layers[index]
    return layer if _begun(layer) and layer.quick(dtype) else None


def _begun(layer: Any) -> bool:
    return layer.store is not None and layer.pending is None
