"""What the layers of a ragged cache have in common: all of them take the same tokens, so arithmetic is done once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunk, flex
from .layout import Layout, Rules, Step, grid
from .mask import UNLIMITED
from .plan import HeadPlan

PREFILL = {"blocks": chunk.attend, "flex": flex.attend}  # how several tokens at once attend


class Rotation:
    """cos, and sin with its first half negated (block.py); computed once for all layers that bring the same."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        known = self._known
        if known is None or known[0] is not cos or known[1] is not sin:
            half = sin.shape[-1] // 2
            known = self._known = cos, sin, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        return cos, known[2]


class Shared:
    """Rules, layouts, and the token that all layers are about to take.

    `windows`: the model's own sliding window of each layer; `warned`: whether the user knows that masks are used.
    """

    def __init__(self, plan: HeadPlan, reserve: int, prefill: str) -> None:
        self.plan, self.reserve, self.prefill = plan, reserve, PREFILL[prefill]
        self.windows = [UNLIMITED] * plan.layers
        self.warned = False
        self._rules: Rules | None = None
        self._layout: Layout | None = None
        self._step: tuple[Any, Step] | None = None
        self.rotation = Rotation()

    def layout(self, counts: tuple[int, ...], device: torch.device) -> Layout:
        """For sequences of `counts` tokens; the same object for all layers that ask for the same."""
        limits = tuple(max(grid(count), self.reserve) for count in counts)
        if self._rules is None or self._rules.sink.device != device:
            self._rules, self._layout = Rules.of(self.plan, device), None
        if self._layout is None or self._layout.limits != limits:
            self._layout = Layout.of(self._rules, limits)
        return self._layout

    def step(self, layout: Layout, counts: tuple[int, ...]) -> Step:
        """One token more; computed once for all layers."""
        if self._step is None or self._step[0] != (id(layout), counts):
            self._step = (id(layout), counts), Step.of(layout, counts, tuple(self.windows))
        return self._step[1]

    def forget(self) -> None:
        self._layout = self._step = None
        self.rotation = Rotation()
