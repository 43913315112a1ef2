"""What transformers tells an attention function about padding and positions, kept apart until a head's rule is known.

transformers builds one mask per forward pass (per kind of layer), for all heads. Heads that keep different parts of the
past need masks of their own, so the registered mask function returns what those are made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from ..errors import ModelError
from .plan import HeadPlan

UNLIMITED = 2**31 - 1


@dataclass(eq=False)
class HeadMask:
    """One forward pass: `queries` new tokens behind those already seen.

    Attributes:
        queries, keys: lengths; the keys are those at indices key_offset ... key_offset + keys - 1 of the sequence.
        query_offset: index of the first query.
        real: bool [batch, >= query_offset + queries], False = padding; None: no padding.
        reach: the model's own sliding window in tokens.
        other: bool [batch or 1, 1, queries, keys], a mask of another kind that also holds.
    """

    batch: int
    queries: int
    keys: int
    query_offset: int
    key_offset: int
    device: torch.device
    real: Tensor | None = None
    reach: int = UNLIMITED
    other: Tensor | None = None
    checked: bool = False

    def check_positions(self, positions: Tensor | None) -> None:
        """ModelError where the position_ids of real tokens do not rise; int64 [batch or 1, queries], None: unknown.

        Once for all layers: they are given the same.
        """
        if self.checked or self.queries == 1 or positions is None or positions.dim() != 2:
            return
        if torch.compiler.is_compiling():
            return
        self.checked = True
        if self.new_tokens is None:
            rising = bool((positions.diff(dim=1) > 0).all())
        else:
            real = self.new_tokens
            known = torch.where(real, positions, -1)
            before = known.cummax(1).values.roll(1, 1)
            before[:, 0] = -1
            rising = bool((~real | (known > before)).all())
        if not rising:
            raise _packed()

    @cached_property
    def new_tokens(self) -> Tensor | None:
        """bool [batch, queries]: which of the new tokens are real; None: all."""
        if self.real is None:
            return None
        new = self.real[:, self.query_offset : self.query_offset + self.queries]
        return None if bool(new.all()) else new

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Positions of the queries, int64 [batch or 1, queries], and of the keys, counted from the first real token.

        Padding is at -1.
        """
        end = max(self.key_offset + self.keys, self.query_offset + self.queries)
        if self.real is None:
            places = torch.arange(end, device=self.device).unsqueeze(0)
        else:
            ahead = self.real.new_ones(self.real.shape[0], max(end - self.real.shape[1], 0))
            real = torch.cat([self.real, ahead], 1)[:, :end]
            places = torch.where(real, real.cumsum(1) - 1, -1)
        return (
            places[:, self.query_offset : self.query_offset + self.queries],
            places[:, self.key_offset : self.key_offset + self.keys],
        )

    def visible(self, plan: HeadPlan, layer: int) -> Tensor:
        """bool [batch or 1, KV heads, queries, keys], True = seen. Padding sees itself, so that it stays finite."""
        queries, keys = self.positions
        seen = plan.visible(layer, queries, keys)
        if self.reach < UNLIMITED:
            seen = seen & (keys[:, None, None, :] > queries[:, None, :, None] - self.reach)
        if self.other is not None:
            seen = seen & self.other
        if self.real is not None:
            own = torch.arange(self.queries, device=self.device)[:, None] + self.query_offset
            itself = own == torch.arange(self.keys, device=self.device) + self.key_offset
            seen = seen | (itself & (queries < 0)[:, None, :, None])
        return seen


def head_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> HeadMask:
    """Registered with transformers. Causal masks and sliding windows are taken apart; any other one is kept beside."""
    found = HeadMask(
        batch_size, q_length, kv_length, int(q_offset), int(kv_offset), torch.device(device), attention_mask
    )
    if mask_function is causal_mask_function:
        return found
    if local_size is not None and _same(mask_function, sliding_window_causal_mask_function(local_size)):
        found.reach = local_size
        return found
    if _holds(mask_function, packed_sequence_mask_function(torch.empty(0))):
        raise _packed()
    found.other = sdpa_mask(
        batch_size, q_length, kv_length, int(q_offset), int(kv_offset), mask_function, attention_mask,
        allow_is_causal_skip=False, device=device, use_vmap=rest.get("use_vmap", False),
    )  # fmt: skip
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two values, functions by code and what they hold, are the same."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if callable(one) and callable(other):
        codes = [getattr(function, "__code__", function) for function in (one, other)]
        held = [tuple(cell.cell_contents for cell in getattr(f, "__closure__", None) or ()) for f in (one, other)]
        return codes[0] is codes[1] and _same(*held)
    return bool(one == other)


def _holds(function: Any, wanted: Any) -> bool:
    """Whether a mask function is, or was put together from, another of the same code."""
    if isinstance(function, (tuple, list)):
        return any(_holds(one, wanted) for one in function)
    if getattr(function, "__code__", None) is None:
        return False
    cells = getattr(function, "__closure__", None) or ()
    return function.__code__ is wanted.__code__ or any(_holds(cell.cell_contents, wanted) for cell in cells)


def _packed() -> ModelError:
    return ModelError(
        "the position_ids restart within a row, as of packed sequences; a head plan counts from the row's first token",
        hint="give every sequence a row of its own with padding and an attention_mask, or take the plan off",
    )
