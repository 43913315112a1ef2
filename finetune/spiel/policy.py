"""Where positions go while they are trained: the policies behind one interface.

SpIEL-AG and SpIEL-MA: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024. Here candidates are
looked for several times in a window instead of in its first backward pass, the moments of a new entry are Adam's own
over the finished updates of the window, and rows and columns that never held an entry can be chosen under MA.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...pruning.mask import Mask
from . import channels
from .candidates import Candidates, Grown
from .layer import Linear
from .positions import contains, is_kept
from .product import Watch
from .ranks import average
from .top import TopPool


class Tracker(Watch, Protocol):
    """A `Watch` that an optimizer can save, and tell of updates.

    Attributes:
        tensors: everything it knows, at the end of an update.
        projection: sum of the entries' gradients in this update.
        scale: what gradients counted at the last update, over what was seen of them.
        looks: whether the update under way looks for positions that it does not know.
    """

    tensors: dict[str, Tensor]
    projection: float
    scale: float
    looks: bool

    def fold(self, scale: float, betas: tuple[float, float]) -> None:
        """An update is finished, whose gradients count `scale` times what was seen."""

    def forget(self) -> None:
        """What was seen since the last update does not count."""


class Policy(Protocol):
    """How entries are trained and moved.

    Attributes:
        moments: "adam" or "sm3": the state that the optimizer keeps.
        moves: whether positions are chosen anew at all.
    """

    moments: str
    moves: bool

    def tracker(self, layer: Linear, adapter: str, count: int, slots: int) -> Tracker:
        """What watches a layer during a window at whose end `count` positions will be asked for."""
        ...

    def grow(self, layer: Linear, adapter: str, tracker: Any, state: dict[str, Tensor], count: int) -> Grown:
        """At most `count` positions that have no entry, with the state they begin with. `state`: the optimizer's."""
        ...


class Static:
    """Positions stay where they are."""

    moments, moves = "adam", False

    def tracker(self, layer: Linear, adapter: str, count: int, slots: int) -> Tracker:
        raise AssertionError("static positions are never chosen anew")

    def grow(self, layer: Linear, adapter: str, tracker: Any, state: dict[str, Tensor], count: int) -> Grown:
        raise AssertionError("static positions are never chosen anew")


class AccumulatedGradient:
    """AG: where the gradient summed over the window is largest, for the channels that it lies on: see `Candidates`."""

    moments, moves = "adam", True

    def tracker(self, layer: Linear, adapter: str, count: int, slots: int) -> Candidates:
        taken, allowed = layer.flat(adapter), layer.allowed(adapter)
        return Candidates(layer.out_features, layer.in_features, slots * count, taken, allowed, spread=True)

    def grow(self, layer: Linear, adapter: str, tracker: Candidates, state: dict[str, Tensor], count: int) -> Grown:
        return tracker.grown(count)


class MomentApproximation:
    """MA: where the product of SM3's row and column accumulators is largest; their memory is rows + columns."""

    moments, moves = "sm3", True

    def tracker(self, layer: Linear, adapter: str, count: int, slots: int) -> RowsAndColumns:
        return RowsAndColumns(layer.out_features, layer.in_features, layer.spiel_values[adapter].device)

    def grow(self, layer: Linear, adapter: str, tracker: RowsAndColumns, state: dict[str, Tensor], count: int) -> Grown:
        rows = filled(state["row"], average(tracker.tensors["rows"]))
        cols = filled(state["col"], average(tracker.tensors["cols"]))
        flat = top_product(rows, cols, count, layer.flat(adapter), layer.allowed(adapter))
        zero = torch.zeros(len(flat), device=flat.device)
        return Grown(flat, zero, zero, torch.zeros(len(flat), dtype=torch.int32, device=flat.device))


POLICIES: dict[str, type[Policy]] = {"static": Static, "ag": AccumulatedGradient, "ma": MomentApproximation}


class RowsAndColumns:
    """A tracker of the squares of the output gradient and the input, per channel. tensors: see `channels`."""

    matrix: Literal["none"] = "none"

    def __init__(self, rows: int, cols: int, device: torch.device) -> None:
        self.tensors = channels.start(rows, cols, device)
        self.projection, self.scale, self.looks = 0.0, 1.0, True
        self._first: int | None = None

    def begin(self, first: int | None) -> None:
        if first is not None and first != self._first:
            self.forget()
            self._first = first

    def forget(self) -> None:
        """The update that is under way does not count."""
        self.projection = 0.0
        channels.forget(self.tensors)

    def see(self, first_row: int, block: Tensor) -> None:
        """Never called: no matrix is asked for."""

    def outer(self, gy: Tensor, x: Tensor) -> None:
        channels.add(self.tensors, gy, x)

    def end(self, gradient: Tensor) -> None:
        self.projection += float(gradient.sum(dtype=torch.float64))

    def fold(self, scale: float, betas: tuple[float, float]) -> None:
        """An update is finished."""
        self.projection, self.scale = 0.0, scale
        channels.fold(self.tensors, scale, 1.0)  # inputs are what they are


def filled(accumulator: Tensor, norms: Tensor) -> Tensor:
    """SM3's accumulator, with an estimate for channels that never held an entry: norms at the scale of the others."""
    seen = accumulator > 0
    mass = float(norms[seen].sum())
    scale = float(accumulator[seen].sum()) / mass if mass > 0 else 1.0
    return torch.where(seen, accumulator, norms * scale)


def top_product(rows: Tensor, cols: Tensor, count: int, taken: Tensor, allowed: Mask | None) -> Tensor:
    """Positions of the `count` largest rows_i * cols_j that are allowed and not taken, ascending.

    Rows are visited from the largest on, a slab at a time, until none can enter any more: no outer product as a whole.
    """
    width, pool = len(cols), TopPool(count, rows.device)
    if not count:
        return pool.position
    order = rows.argsort(descending=True, stable=True)
    largest = float(cols.max()) if width else 0.0
    height = max(1, (1 << 17) // max(1, width))
    for slab in order.split(height):
        if len(pool.position) == count and float(rows[slab[0]]) * largest < pool.floor:
            break
        products = torch.outer(rows[slab], cols)
        place = (slab.unsqueeze(1) * width + torch.arange(width, device=rows.device)).reshape(-1)
        flat = products.reshape(-1)
        fit = (flat >= pool.floor).nonzero().flatten() if pool.floor else (flat > 0).nonzero().flatten()
        fit = fit[~contains(taken, place[fit])]
        if allowed is not None:
            fit = fit[is_kept(allowed, place[fit])]
        pool.add(place[fit], flat[fit])
    return pool.position.sort().values


def get_policy(name: str) -> Policy:
    """An instance of the named policy; the name was checked by the configuration."""
    return POLICIES[name]()
