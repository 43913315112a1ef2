"""A cache whose memory is made once and whose length is a plain number: what our decode loop runs on.

transformers' StaticCache hands out all of its rows, filled or not, with a mask of what is filled; its DynamicCache
copies everything for every token. This one hands out the filled rows alone, so that one token needs no mask, and says
where its memory lies, so that compiled code can store the token itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Rows:
    """Keys and values of a layer as matrices [rows, D]. `fits`: what has looked at them and can store there."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.made_of = keys, values
        self.keys, self.values = keys.view(-1, keys.shape[-1]), values.view(-1, values.shape[-1])
        self.places = self.keys.data_ptr(), self.values.data_ptr(), self.keys.shape[0]
        self.fits: Any = None

    def __reduce__(self) -> tuple[type[Rows], tuple[Tensor, Tensor]]:
        return Rows, self.made_of  # a copy lies somewhere else

    def are(self, keys: Tensor | None, values: Tensor | None) -> bool:
        return self.made_of[0] is keys and self.made_of[1] is values


class Place(NamedTuple):
    """Where one token of every sequence is stored, and what it sees then: as of `window_step`.

    slots int64 [batch, KV heads]; ranges int64 [batch, KV heads, 4].
    """

    rows: Rows
    slots: Tensor
    ranges: Tensor


class SeenLayer(CacheLayerMixin):
    """A layer whose length is the plain number `seen`, padding included."""

    is_sliding = False
    supports_early_init = False
    seen: int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: positions of new ones come from it."""
        return self.seen

    def get_max_length(self) -> int:
        return -1


class FilledLayer(SeenLayer):
    """One layer, [batch, KV heads, capacity, D], of which the first `seen` tokens are there; it grows when full."""

    def __init__(self, steps: Steps, capacity: int) -> None:
        super().__init__()
        self._steps, self._capacity = steps, capacity
        self.reset()

    def reset(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._rows: Rows | None = None
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._empty(key_states), self._empty(value_states)
        self.is_initialized = True

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:2], self._capacity, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores keys and values [batch, KV heads, new tokens, D]; all that there are, as views of the memory."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._grown(self.seen + key_states.shape[2])
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self.seen : end] = key_states
        self.values[:, :, self.seen : end] = value_states
        self.seen = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grown(self, end: int) -> int:
        if end > self._capacity:
            self._capacity, self._rows = max(end, 2 * self._capacity), None
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                new = self._empty(old)
                new[:, :, : self.seen] = old[:, :, : self.seen]
                setattr(self, name, new)
        return end

    def place_one(self, reach: int | None = None) -> Place | None:
        """Where the next token of every sequence goes; None for a layer that has not begun. See RaggedLayer."""
        rows = self._rows
        if rows is None or not rows.are(self.keys, self.values) or self.seen >= self._capacity:
            rows = self._rows = self._laid_out()
        return None if rows is None else Place(rows, *self._steps(self._sizes, self.seen))

    def _laid_out(self) -> Rows | None:
        if self.keys is None or self.values is None or self.keys.shape != self.values.shape:
            return None
        self._grown(self.seen + 1)
        batch, heads, capacity, _ = self.keys.shape
        self._sizes = batch, heads, capacity
        return Rows(self.keys, self.values)

    def placed_one(self) -> None:
        """The token that `place_one` made room for is there."""
        self.seen += 1


class Steps:
    """Slots and ranges of one token, computed once for all layers."""

    def __init__(self) -> None:
        self._known: tuple[tuple[int, int, int], int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, sizes: tuple[int, int, int], seen: int) -> tuple[Tensor, Tensor]:
        """sizes: batch, KV heads, capacity."""
        known = self._known
        if known is not None and known[1] == seen and known[0] == sizes:
            return known[2]
        batch, heads, capacity = sizes
        ranges = every_key(batch, heads, seen + 1, capacity)
        made = ranges[..., 0] + seen, ranges
        self._known = sizes, seen, made
        return made


def every_key(batch: int, kv_heads: int, length: int, capacity: int) -> Tensor:
    """The ranges of `window_attention` for the first `length` rows of every head of [batch, KV heads, capacity]."""
    ranges = torch.zeros(batch, kv_heads, 4, dtype=torch.int64, device="cpu")
    ranges[..., 0] = torch.arange(batch * kv_heads, device="cpu").view(batch, kv_heads) * capacity
    ranges[..., 1] = length
    return ranges


class FilledCache(Cache):
    """For `layers` layers, with room for `capacity` tokens from the begin."""

    def __init__(self, layers: int, capacity: int) -> None:
        steps = Steps()
        super().__init__(layers=[FilledLayer(steps, capacity) for _ in range(layers)])
