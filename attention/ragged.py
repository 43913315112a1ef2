"""A cache that holds what each KV head keeps and nothing else, for models of transformers as they are.

A model hands the result of `Cache.update` to its attention function. Here that result stands for the cache itself, and the
attention function (function.py) calls `RaggedLayer.attend`, which attends, stores the new tokens and drops old ones. The
first time, a layer returns the new keys and values as they are, marked: a model that changes keys or values on the way loses
the mark, and its layers then keep everything and leave the plan to the mask.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import KernelError, ModelError
from ..kernels.window_attention.dispatch import window_step
from . import chunk
from .layout import Layout, Rules, Step, grid
from .mask import UNLIMITED, HeadMask
from .plan import HeadPlan, HeadRule

MARK = "gossamer_layer"


class Held:
    """What `update` returns: the keys (or values) of a layer, whose memory only the attention function knows."""

    def __init__(self, layer: RaggedLayer) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        raise ModelError(
            f"the model asks for {name!r} of keys or values between its cache and its attention function, "
            "but these are kept per head",
            hint="apply the plan with cache='masked': the same results, without the saving of memory",
        )


class Shared:
    """What the layers of a cache have in common: rules, and the arithmetic of the token that all are about to take."""

    def __init__(self, plan: HeadPlan, reserve: int = 0) -> None:
        self.plan, self.reserve = plan, reserve
        self.windows = [UNLIMITED] * plan.layers
        self._rules: Rules | None = None
        self._layout: Layout | None = None
        self._step: tuple[Any, Step] | None = None
        self.warned = False

    def layout(self, counts: tuple[int, ...], device: torch.device) -> Layout:
        """For sequences of `counts` tokens; the same object for all layers that ask for the same."""
        limits = tuple(max(grid(count), self.reserve) for count in counts)
        if self._rules is None or self._rules.sink.device != device:
            self._rules, self._layout = Rules.of(self.plan, device), None
        if self._layout is None or self._layout.limits != limits:
            self._layout = Layout.of(self._rules, limits)
        return self._layout

    def step(self, layout: Layout, counts: tuple[int, ...]) -> Step:
        if self._step is None or self._step[0] != (id(layout), counts):
            self._step = (id(layout), counts), Step.of(layout, counts, tuple(self.windows))
        return self._step[1]

    def forget(self) -> None:
        self._layout = self._step = None


class RaggedLayer(CacheLayerMixin):
    """Keys and values [batch, rows, D] of one layer, as layout.py describes them.

    `counts`: real tokens of each sequence so far; `seen`: tokens with padding, what transformers calls the length.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.rules: tuple[HeadRule, ...] = shared.plan.heads[index]
        self.reset()

    def reset(self) -> None:
        """Empty, memory given back."""
        self.keys = self.values = None
        self.layout: Layout | None = None
        self.counts: tuple[int, ...] = ()
        self.seen = 0
        self.pending: tuple[Tensor, Tensor] | None = None
        self.dense = False
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.counts = (0,) * key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Takes keys and values [batch, KV heads, new tokens, D]; what to hand to the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.pending is not None:
            self._keep_all()
        self.seen += key_states.shape[2]
        if self.dense:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
            return self.keys, self.values
        self.pending = key_states, value_states
        if self.layout is not None:
            return Held(self), Held(self)
        # A view each, so that the mark is on an object of our own.
        marked = key_states.view_as(key_states), value_states.view_as(value_states)
        for tensor in marked:
            setattr(tensor, MARK, self)
        return marked

    def _keep_all(self) -> None:
        """The last tokens were attended to by someone else. From now on this layer keeps everything."""
        if self.layout is not None:
            raise ModelError("the attention function did not take the keys that the cache gave it")
        if not self.shared.warned:
            self.shared.warned = True
            warnings.warn(
                "the model changes keys or values between its cache and its attention function; the head plan is kept "
                "by masks, and no memory is saved",
                RuntimeWarning,
                stacklevel=2,
            )
        self.keys, self.values = self.pending  # type: ignore[misc]
        self.pending, self.dense = None, True

    def attend(self, query: Tensor, mask: HeadMask, scale: float) -> Tensor:
        """Attention [batch, query heads, q, D] of the tokens last given to `update`; then those are stored."""
        assert self.pending is not None
        if mask.other is not None:
            raise ModelError(
                "the model's mask is neither causal nor a sliding window", hint="apply the plan with cache='masked'"
            )
        (key, value), self.pending = self.pending, None
        self.shared.windows[self.index] = mask.reach
        if query.shape[2] == 1 and mask.new_tokens is None and self.layout is not None:
            return self._attend_one(query, key, value, scale)
        return self._attend_many(query, key, value, mask, scale)

    def _attend_one(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        assert self.layout is not None
        after = tuple([count + 1 for count in self.counts])
        if not self.layout.holds(after):
            self._lay_out(self.shared.layout(after, key.device))
        assert self.layout is not None and self.keys is not None and self.values is not None
        step = self.shared.step(self.layout, self.counts)
        width = key.shape[3]
        try:
            out = window_step(
                query.squeeze(2).contiguous(), key.squeeze(2).contiguous(), value.squeeze(2).contiguous(),
                self.keys.view(-1, width), self.values.view(-1, width),
                step.slots[self.index], step.ranges[self.index], scale,
            )  # fmt: skip
        except KernelError as error:
            raise ModelError(f"layer {self.index} cannot run with a ragged cache: {error.message}") from error
        self.counts = after
        return out.unsqueeze(2)

    def _attend_many(self, query: Tensor, key: Tensor, value: Tensor, mask: HeadMask, scale: float) -> Tensor:
        out = query.new_zeros(query.shape)
        new = mask.new_tokens
        news = [query.shape[2]] * len(self.counts) if new is None else new.sum(1).tolist()
        after = tuple(count + more for count, more in zip(self.counts, news, strict=True))
        fresh = None
        if self.layout is None or not self.layout.holds(after):
            fresh = self._empty(self.shared.layout(after, key.device), key)
        group = query.shape[1] // len(self.rules)
        for rows, tokens in self._alike(new, query.shape[2]):
            start, more = self.counts[rows[0]], len(tokens)
            for rule, heads in _by_rule(self.rules):
                own = [head * group + i for head in heads for i in range(group)]
                span = self._span(rows, heads).then(
                    start, _pick(key, rows, heads, tokens), _pick(value, rows, heads, tokens)
                )
                if more:
                    made = chunk.attend(
                        _pick(query, rows, own, tokens), span, start, rule, self.shared.plan.block, scale, mask.reach
                    )
                    _put(out, rows, own, tokens, made)
                self._store(fresh, rows, heads, span, start, start + more)
        if fresh is not None:
            self.layout, self.keys, self.values = fresh
        self.counts = after
        return out

    def _alike(self, new: Tensor | None, length: int) -> list[tuple[list[int], list[int]]]:
        """Sequences (and the new tokens that are real) that have the same count, ring and real tokens."""
        groups: dict[Any, tuple[list[int], list[int]]] = {}
        limits = self.layout.limits if self.layout is not None else (0,) * len(self.counts)
        real = (
            [list(range(length))] * len(self.counts) if new is None else [row.nonzero()[:, 0].tolist() for row in new]
        )
        for row, tokens in enumerate(real):
            groups.setdefault((self.counts[row], limits[row], tuple(tokens)), ([], tokens))[0].append(row)
        return list(groups.values())

    def _span(self, rows: list[int], heads: list[int]) -> chunk.Span:
        """What is stored of some sequences and heads with equal counts and rules, in order."""
        count, rule = self.counts[rows[0]], self.rules[heads[0]]
        kept = rule.kept(count, self.shared.plan.block)
        sinks = min(rule.sink, count)
        positions = torch.cat([torch.arange(sinks), torch.arange(count - (kept - sinks), count)]).to(self.device)
        if self.layout is None or not positions.numel():
            empty = torch.empty(0)
            return chunk.Span(positions[:0], empty, empty)
        assert self.keys is not None and self.values is not None
        places = torch.stack([self.layout.row(self.index, rows[0], head, positions) for head in heads])
        which = torch.tensor(rows, device=self.device).view(-1, 1, 1)
        return chunk.Span(positions, self.keys[which, places], self.values[which, places])

    def _store(
        self,
        fresh: tuple[Layout, Tensor, Tensor] | None,
        rows: list[int],
        heads: list[int],
        span: chunk.Span,
        before: int,
        after: int,
    ) -> None:
        """Writes what stays of a span once `after` tokens were seen: all of it into a new layout, else the new part."""
        rule = self.rules[heads[0]]
        kept = rule.kept(after, self.shared.plan.block)
        stays = (span.positions < rule.sink) | (span.positions >= after - (kept - min(rule.sink, after)))
        if fresh is None:
            assert self.layout is not None and self.keys is not None and self.values is not None
            layout, keys, values = self.layout, self.keys, self.values
            stays &= span.positions >= before
        else:
            layout, keys, values = fresh
        index = stays.nonzero()[:, 0]
        if not index.numel():
            return
        positions = span.positions[index]
        which = torch.tensor(rows, device=self.device)
        for i, head in enumerate(heads):
            places = layout.row(self.index, rows[0], head, positions)
            keys[which[:, None], places] = span.key[:, i, index].detach()
            values[which[:, None], places] = span.value[:, i, index].detach()

    def _empty(self, layout: Layout, like: Tensor) -> tuple[Layout, Tensor, Tensor]:
        shape = (len(layout.limits), layout.rows[self.index], like.shape[3])
        return layout, like.new_zeros(shape), like.new_zeros(shape)

    def _lay_out(self, layout: Layout) -> None:
        """Moves everything to a layout with more room."""
        assert self.keys is not None
        fresh = self._empty(layout, self.keys.unsqueeze(1))
        for rows, _ in self._alike(None, 0):
            count = self.counts[rows[0]]
            for _, heads in _by_rule(self.rules):
                self._store(fresh, rows, heads, self._span(rows, heads), count, count)
        self.layout, self.keys, self.values = fresh

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: positions of new ones come from it."""
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def select(self, indices: Tensor, layout: Layout | None) -> None:
        """Only the sequences `indices`, each any number of times. `layout`: that of this cache, so selected."""
        if not self.is_initialized:
            return
        if self.pending is not None:
            self._keep_all()
        if self.keys is not None and self.values is not None:
            where = indices.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, where), self.values.index_select(0, where)
        self.counts = tuple(self.counts[index] for index in indices.tolist())
        self.layout = layout

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ModelError(
                "a ragged cache cannot take tokens back: it has dropped what they pushed out",
                hint="apply the plan with cache='masked', or generate without an assistant model",
            )


class RaggedCache(Cache):
    """A cache for a head plan. `reserve`: tokens that there shall be room for from the begin."""

    def __init__(self, plan: HeadPlan, reserve: int = 0) -> None:
        self.shared = Shared(plan, reserve)
        super().__init__(layers=[RaggedLayer(self.shared, index) for index in range(plan.layers)])

    @property
    def plan(self) -> HeadPlan:
        return self.shared.plan

    def reset(self) -> None:
        super().reset()
        self.shared.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        sequences = len(self.layers[0].counts)
        self.batch_select_indices(torch.arange(sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences `indices`, each any number of times."""
        indices = indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices
        layouts: dict[int, Layout] = {}
        for layer in self.layers:
            layout = layer.layout
            if layout is not None:
                layout = layouts.setdefault(id(layer.layout), layout.select(indices))
            layer.select(indices, layout)
        self.shared.forget()


def _by_rule(rules: tuple[HeadRule, ...]) -> list[tuple[HeadRule, list[int]]]:
    found: dict[HeadRule, list[int]] = {}
    for head, rule in enumerate(rules):
        found.setdefault(rule, []).append(head)
    return list(found.items())


def _pick(tensor: Tensor, rows: list[int], heads: list[int], tokens: list[int]) -> Tensor:
    """tensor [batch, heads, tokens, D] at three lists; nothing is copied where a list is everything."""
    for dim, wanted in enumerate((rows, heads, tokens)):
        if len(wanted) != tensor.shape[dim] or wanted != list(range(len(wanted))):
            tensor = tensor.index_select(dim, torch.tensor(wanted, dtype=torch.int64, device=tensor.device))
    return tensor


def _put(out: Tensor, rows: list[int], heads: list[int], tokens: list[int], made: Tensor) -> None:
    places = (torch.tensor(wanted, dtype=torch.int64, device=out.device) for wanted in (rows, heads, tokens))
    row, head, token = places
    out[row[:, None, None], head[None, :, None], token[None, None, :]] = made
