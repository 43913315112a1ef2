"""Which positions without a delta have the largest accumulated gradient: a sketch in memory for the best of them only.

A position enters when its gradient in one backward pass is larger than the accumulated gradient of the weakest that is
held; from then on everything about it is summed up. So positions whose gradient is large or persistent are found, and
nothing of the size of the matrix is kept. With room for all positions the sums are exact. In updates that do not look,
what is held goes on, from a product sampled at its positions, and nothing enters.

With `spread`, positions compete by G_ij^2 / (r_i c_j): G is the accumulated gradient of entry (i, j), r_i and c_j are
the norms of its row and column in the whole gradients that were looked at. That lies between G^2, the gain of a step of
fixed length, and G^2 / (r_i^2 c_j^2), the gain of a Newton step if curvature goes with those squares. G alone puts most
entries on the few channels that are large, where they overshoot together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...kernels.bitmask.dispatch import unpack_bits
from ...kernels.csr.dispatch import csr_sampled
from ...pruning.mask import Mask
from . import channels
from .positions import merged, to_csr
from .ranks import average, gather, world_size
from .top import TopPool, highest

_FLOATS = ("total", "now", "m", "v")
_HELD = (*_FLOATS, "position", "age")


@dataclass(frozen=True)
class Grown:
    """Positions to begin deltas at, ascending, with Adam's moments and age as if they had been trained all along."""

    flat: Tensor
    m: Tensor
    v: Tensor
    age: Tensor


class Candidates:
    """A `Watch` over one layer for one window.

    tensors: position int64 [C] ascending; now: gradient of this update so far, as it is seen; total: of finished
    updates, as they were applied; m, v: Adam's moments over finished updates; age int32: their number since the
    position is held; with `spread` those of `channels`.
    scale: applied over seen (clipping, loss scale), of the last update that is known.
    looks: whether positions may enter in this update.
    """

    def __init__(
        self, rows: int, cols: int, capacity: int, taken: Tensor, allowed: Mask | None, power: int = 1,
        spread: bool = False,
    ) -> None:  # fmt: skip
        """taken: positions that are none of the candidates, ascending. power: of the gradients that are summed."""
        self.spread = spread
        self.projection, self.scale, self.looks = 0.0, 1.0, True
        self.rows, self.cols, self.capacity, self.taken, self.allowed, self.power = (
            rows, cols, capacity, taken, allowed, power,
        )  # fmt: skip
        device = taken.device
        self.tensors = {name: torch.empty(0, device=device) for name in _FLOATS}
        self.tensors["position"] = torch.empty(0, dtype=torch.int64, device=device)
        self.tensors["age"] = torch.empty(0, dtype=torch.int32, device=device)
        if spread:
            self.tensors |= channels.start(rows, cols, device)
        self._floor = 0.0
        self._first: int | None = None
        self._known: tuple[Tensor, Tensor] | None = None
        self._columns: Tensor | None = None
        self._pool = TopPool(capacity, device)
        self._csr: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @property
    def matrix(self) -> Literal["needed", "welcome"]:
        return "needed" if self.looks else "welcome"

    def begin(self, first: int | None) -> None:
        if first is not None and first != self._first:
            self.forget()
            self._first = first
        if not self.looks:
            return
        if self.spread:
            rows, cols = channels.so_far(self.tensors, self.scale, self.scale)
            self._known, self._columns = (rows, cols) if bool(cols.any()) else None, None
        self._pool = TopPool(self.capacity, self.taken.device)
        scores = self.scores()
        full = len(scores) == self.capacity and self.capacity
        self._floor = float(scores.min()) / self.scale if full and self.scale > 0 else 0.0

    def forget(self) -> None:
        """The update that is under way does not count."""
        self.tensors["now"].zero_()
        self.projection = 0.0
        if self.spread:
            channels.forget(self.tensors)

    def _weight_of(self, position: Tensor, squares: tuple[Tensor, Tensor]) -> Tensor:
        """What a gradient is multiplied by in comparisons, given squared norms of rows and columns."""
        rows, cols = map(_weights, squares)
        return rows[position // self.cols] * cols[position % self.cols]

    def _during_pass(self) -> tuple[Tensor, Tensor]:
        """Squared norms to offer by: those known when the pass began; in a first look those of its own rows so far.

        Columns are then those of its first block, the same for all blocks.
        """
        rows, cols = self._known or channels.so_far(self.tensors, self.scale, self.scale)
        if self._known is None:
            self._columns = cols if self._columns is None else self._columns
            cols = self._columns
        return rows, cols

    def see(self, first_row: int, block: Tensor) -> None:
        """Adds a block of gradients to what is held; if it looks, remembers what is larger than the weakest of it."""
        block, first = self._prepared(first_row, block).contiguous(), first_row * self.cols
        flat = block.view(-1)
        position = self.tensors["position"]
        held = torch.searchsorted(position, torch.tensor([first, first + len(flat)], device=position.device)).tolist()
        own = position[held[0] : held[1]] - first
        self.tensors["now"][held[0] : held[1]] += flat[own]
        if self.looks:
            weights = None
            if self.spread:
                channels.add_block(self.tensors, first_row, block)
                rows, cols = map(_weights, self._during_pass())
                weights = rows[first_row : first_row + len(block)], cols
            flat[own] = 0.0
            flat[_within(self.taken, first, len(flat)) - first] = 0.0
            self._pool.offer(first, block, self._floor, weights)

    def _prepared(self, first_row: int, block: Tensor) -> Tensor:
        if self.allowed is not None:
            bits = self.allowed.bits[first_row : first_row + len(block)].to(block.device)
            block.masked_fill_(~unpack_bits(bits, self.cols), 0.0)
        return block.square_() if self.power == 2 else block

    def outer(self, gy: Tensor, x: Tensor) -> None:
        """Adds to what is held."""
        now, position = self.tensors["now"], self.tensors["position"]
        if len(now):
            if self._csr is None or self._csr[0] is not position:
                self._csr = position, to_csr(position, self.rows, self.cols)
            found = csr_sampled(gy, x, *self._csr[1]).to(now.dtype)
            now += found.square_() if self.power == 2 else found

    def end(self, gradient: Tensor) -> None:
        self.projection += float(gradient.sum(dtype=torch.float64))
        if self.looks:
            position, value = self._pool.position, self._pool.value
            self._enter(position, value / self._weight_of(position, self._during_pass()) if self.spread else value)

    def _enter(self, position: Tensor, value: Tensor) -> None:
        """New positions, ascending, with their gradient in this pass; the weakest of all are let go."""
        fresh = {name: torch.zeros_like(value) for name in _FLOATS}
        fresh |= {"now": value, "position": position, "age": torch.zeros_like(position, dtype=torch.int32)}
        order = merged(self.tensors["position"], position)
        self._replace({name: torch.cat([self.tensors[name], fresh[name]])[order] for name in _HELD})

    def _replace(self, tensors: dict[str, Tensor]) -> None:
        keep = highest(self._scores(tensors), self.capacity)
        for name, tensor in tensors.items():
            self.tensors[name] = tensor[keep]

    def scores(self) -> Tensor:
        """|accumulated gradient|, weighted by its channels, [C]."""
        return self._scores(self.tensors)

    def _scores(self, tensors: dict[str, Tensor]) -> Tensor:
        """In the units of applied gradients: else one batch of a large loss scale would outweigh all before it."""
        size = (tensors["total"] + tensors["now"] * self.scale).abs()
        if not self.spread:
            return size
        return size * self._weight_of(tensors["position"], channels.so_far(self.tensors, self.scale, self.scale))

    def fold(self, scale: float, betas: tuple[float, float]) -> None:
        """An update is finished: its gradient, times `scale`, goes into the moments, the same on every rank."""
        self.projection, self.scale = 0.0, scale
        if self.spread and self.looks:
            for name in ("now_rows", "now_cols"):
                self.tensors[name] = average(self.tensors[name])
            channels.fold(self.tensors, scale, scale)
        if world_size() > 1:
            self._replace(_merged(self.tensors))
        held = self.tensors
        now = held["now"] * scale
        held["m"] = betas[0] * held["m"] + (1 - betas[0]) * now
        held["v"] = betas[1] * held["v"] + (1 - betas[1]) * now * now
        held["total"], held["now"] = held["total"] + now, torch.zeros_like(now)
        held["age"] = held["age"] + 1

    def grown(self, count: int) -> Grown:
        """The best `count` of what is held, or fewer."""
        keep = highest(self.scores(), count)
        return Grown(*(self.tensors[name][keep] for name in ("position", "m", "v", "age")))


def _weights(squares: Tensor) -> Tensor:
    """1 / sqrt(norm), 0 where nothing was."""
    return squares.rsqrt().sqrt().nan_to_num(0.0, 0.0)  # a power of -0.25 takes many times as long


def _within(ascending: Tensor, first: int, length: int) -> Tensor:
    edges = torch.searchsorted(ascending, torch.tensor([first, first + length], device=ascending.device)).tolist()
    return ascending[edges[0] : edges[1]]


def _merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks hold, as one: gradients of this update averaged, moments of whoever has held a position longest.

    Summed on the CPU in the order of the ranks, so that every rank gets the same bits.
    """
    device = tensors["position"].device
    everyone = {name: torch.cat(gather(tensors[name].cpu())) for name in _HELD}
    position, place = everyone["position"].unique(return_inverse=True)
    now = torch.zeros(len(position)).index_add_(0, place, everyone["now"]) / world_size()
    order = everyone["age"].argsort(stable=True)
    order = order[place[order].argsort(stable=True)]  # by position, then by age: the last of a position is the eldest
    eldest = order[torch.bincount(place).cumsum(0) - 1]
    made = {name: everyone[name][eldest] for name in ("total", "m", "v", "age")}
    return {name: tensor.to(device) for name, tensor in (made | {"position": position, "now": now}).items()}
