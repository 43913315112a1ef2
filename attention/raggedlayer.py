"""One layer of a ragged cache: takes new keys and values, attends, stores what is kept.

A model hands the result of `Cache.update` to its attention function. Here that result stands for the cache itself, and
the attention function (function.py) calls `RaggedLayer.attend`, which attends, stores the new tokens and drops old
ones. The first time, a layer returns the new keys and values as they are, marked: a model that changes keys or values
on the way loses the mark, and its layers then keep everything and leave the plan to the mask. So does a layer whose
marked keys arrive twice, because another layer shares them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError, ModelError
from ..kernels.arguments import CODES
from ..kernels.window_attention.dispatch import MAX_GROUP, window_step
from .filled import Place, Rows, SeenLayer
from .layout import Layout
from .mask import HeadMask
from .shared import Shared
from .store import Store, by_rule, pick, put

MARK = "gossamer_layer"


class Held:
    """What `update` returns: the keys (or values) of a layer, whose memory only the attention function knows."""

    def __init__(self, layer: RaggedLayer) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModelError(
            f"the model asks for {name!r} of keys or values between its cache and its attention function, "
            "but these are kept per head",
            hint="apply the plan with cache='masked': the same results, without the saving of memory",
        )


class RaggedLayer(SeenLayer):
    """One layer. `seen`: tokens with padding, what transformers calls the length. `store`: None until the first ones.

    `keys` and `values` are only there for a layer that keeps everything.
    """

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.reset()

    def reset(self) -> None:
        """Empty, memory given back."""
        self.keys = self.values = None
        self.store: Store | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Takes keys and values [batch, KV heads, new tokens, D]; what to hand to the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.pending is not None:
            self._keep_all(self.pending)
        self.seen += key_states.shape[2]
        if self.keys is not None and self.values is not None:
            self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
            return self.keys, self.values
        self.pending = key_states, value_states
        if self.store is not None:
            return Held(self), Held(self)
        # A view each, so that the mark is on an object of our own.
        marked = key_states.view_as(key_states), value_states.view_as(value_states)
        for tensor in marked:
            setattr(tensor, MARK, self)
        return marked

    def _keep_all(self, pending: tuple[Tensor, Tensor]) -> None:
        """The last tokens were attended to by someone else. From now on this layer keeps everything."""
        if self.store is not None:
            raise ModelError("the attention function did not take the keys that the cache gave it")
        self._warn()
        (self.keys, self.values), self.pending = pending, None

    def share(self, key: Tensor, value: Tensor) -> None:
        """Another layer reads the first keys and values too. From now on this layer keeps everything."""
        if self.seen != key.shape[2]:
            raise ModelError(
                "the attention function was given keys that it has taken before",
                hint="apply the plan with cache='masked'",
            )
        self._warn()
        self.keys, self.values, self.store = key, value, None

    def _warn(self) -> None:
        if self.shared.warned:
            return
        self.shared.warned = True
        warnings.warn(
            "the model changes keys or values between its cache and its attention function, or shares them between "
            "layers; the head plan is kept by masks there, and no memory is saved",
            RuntimeWarning,
            stacklevel=3,
        )

    def attend(self, query: Tensor, mask: HeadMask, scale: float) -> Tensor:
        """Attention [batch, query heads, q, D] of the tokens last given to `update`; then those are stored.

        query: [batch, query heads, q, D]. ModelError for a mask that is neither causal nor a sliding window.
        """
        if mask.other is not None:
            raise ModelError(
                "the model's mask is neither causal nor a sliding window", hint="apply the plan with cache='masked'"
            )
        if self.pending is None:
            raise ModelError(
                "the attention function was given keys that it has taken before: layers share them, or it ran twice",
                hint="apply the plan with cache='masked'",
            )
        (key, value), self.pending = self.pending, None
        self.shared.windows[self.index] = mask.reach
        if self.store is None:
            self._begin(key)
        assert self.store is not None
        # Under autocast rotation widens query and key, not the value; what is stored has the type of the first keys.
        made, dtype = query.dtype, self.store.keys.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if query.shape[2] == 1 and mask.new_tokens is None and self.quick(dtype) and not gradient:
            return self._attend_one(self.store, query, key, value, scale).to(made)
        return self._attend_many(self.store, query, key, value, mask, scale).to(made)

    def quick(self, dtype: torch.dtype) -> bool:
        """Whether one token goes through the kernel. Gradients, and what it has no code for, go the way of many."""
        return dtype in CODES and self.shared.plan.group <= MAX_GROUP

    def _begin(self, like: Tensor) -> None:
        plan = self.shared.plan
        layout = self.shared.layout((0,) * like.shape[0], like.device)
        self.store = Store(self.index, plan.heads[self.index], plan.block, layout, like)

    def take_one(self, query: Tensor, key: Tensor, value: Tensor, scale: float, reach: int) -> Tensor:
        """`update` and `attend` for one token of every sequence, without padding, in a layer that has begun.

        query [batch, query heads, D], key and value [batch, KV heads, D], contiguous; attention like the query.
        """
        assert self.store is not None
        self.seen += 1
        self.shared.windows[self.index] = reach
        return self._step(self.store, query, key, value, scale)

    def place_one(self, reach: int) -> Place:
        """Where the next token of every sequence goes and what it sees, for a layer that has begun (take_one).

        Nothing is counted until `placed_one`.
        """
        assert self.store is not None
        self.shared.windows[self.index] = reach
        return self._place(self.store)

    def placed_one(self) -> None:
        """The token that `place_one` made room for is there."""
        assert self.store is not None
        self.seen += 1
        self.store.counts = tuple([count + 1 for count in self.store.counts])

    def _place(self, store: Store) -> Place:
        after = tuple([count + 1 for count in store.counts])
        if not store.layout.holds(after):
            store.make_room(self.shared.layout(after, store.keys.device))
        if store.rows is None or not store.rows.are(store.keys, store.values):
            store.rows = Rows(store.keys, store.values)
        step = self.shared.step(store.layout, store.counts)
        return Place(store.rows, step.slots[self.index], step.ranges[self.index])

    def _attend_one(self, store: Store, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (tensor.squeeze(2).contiguous() for tensor in (query, key, value))
        return self._step(store, query, key, value, scale).unsqueeze(2)

    def _step(self, store: Store, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        place = self._place(store)
        try:
            out = window_step(query, key, value, place.rows.keys, place.rows.values, place.slots, place.ranges, scale)
        except KernelError as error:
            raise ModelError(
                f"layer {self.index} cannot run with a ragged cache: {error.message}",
                hint=error.hint or "apply the plan with cache='masked'",
            ) from error
        store.counts = tuple([count + 1 for count in store.counts])
        return out

    def _attend_many(
        self, store: Store, query: Tensor, key: Tensor, value: Tensor, mask: HeadMask, scale: float
    ) -> Tensor:
        out, new = query.new_zeros(query.shape), mask.new_tokens
        news = [query.shape[2]] * len(store.counts) if new is None else new.sum(1).tolist()
        after = tuple(count + more for count, more in zip(store.counts, news, strict=True))
        if not store.layout.holds(after):
            store.make_room(self.shared.layout(after, key.device))
        group = query.shape[1] // len(store.rules)
        for rows, tokens in store.alike(new, query.shape[2]):
            start = store.counts[rows[0]]
            for rule, heads in by_rule(store.rules) if tokens else []:
                own = [head * group + i for head in heads for i in range(group)]
                span = store.span(rows, rule, heads).then(
                    start, pick(key, rows, heads, tokens), pick(value, rows, heads, tokens)
                )
                made = self.shared.prefill(
                    pick(query, rows, own, tokens), span, start, rule, store.block, scale, mask.reach
                )
                put(out, rows, own, tokens, made)
                store.write(span, rows, rule, heads, start + len(tokens))
        store.counts = after
        return out

    def select(self, indices: Tensor, layout: Layout | None) -> None:
        """Only the sequences `indices`, each any number of times. `layout`: that of the store, so selected."""
        if self.pending is not None:
            self._keep_all(self.pending)
        if self.store is not None and layout is not None:
            self.store.select(indices, layout)
        elif self.keys is not None and self.values is not None:
            where = indices.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, where), self.values.index_select(0, where)

    def offload(self) -> None:
        raise ModelError("a ragged cache cannot be offloaded", hint="apply the plan with cache='masked'")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ModelError(
                "a ragged cache cannot take tokens back: it has dropped what they pushed out",
                hint="apply the plan with cache='masked', or generate without an assistant model",
            )
