"""One contender of a benchmark: a weight in some form, its bytes, its truth and its target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .rounds import Contender

_CHECKED_ROWS = 1024  # in float64 at a time


@dataclass
class Checked(Contender, ABC):
    """`call()` reads `bytes` from memory; its result is checked before it is timed.

    `dense`: one of those that speedups refer to. `must`: the speedup over the fastest other one of them that it has to
    reach, or over as many of those as `products` says; `must_share`: the share of the machine's read bandwidth.
    """

    bytes: int
    dense: bool = field(default=False, kw_only=True)
    must: float | None = field(default=None, kw_only=True)
    must_share: float | None = field(default=None, kw_only=True)
    products: int = field(default=1, kw_only=True)

    @abstractmethod
    def fault(self) -> str:
        """What is wrong with the result, or an empty text."""


@dataclass
class Case(Checked):
    """`call()` computes y [1, rows] of x [1, cols] and weight [rows, cols].

    `moved`, of the shape of x: by how much the operation may change each number of x before it multiplies.
    """

    x: Tensor
    weight: Tensor
    moved: Tensor | None = field(default=None, kw_only=True)

    def fault(self) -> str:
        """Right are sums of `cols` products in float32, rounded once."""
        with self.setting():
            y = self.call()
        if y.shape != (1, len(self.weight)):
            return f"shape {list(y.shape)}"
        parts = zip(y.double().split(_CHECKED_ROWS, 1), self.weight.split(_CHECKED_ROWS), strict=True)
        moved = torch.zeros_like(self.x, dtype=torch.float64) if self.moved is None else self.moved
        worst = max(_excess(part, self.x.double(), weight.double(), y.dtype, moved) for part, weight in parts)
        return "" if worst <= 1.0 else f"{worst:.1f} times the allowed error"


def _excess(y: Tensor, x: Tensor, weight: Tensor, dtype: torch.dtype, moved: Tensor) -> float:
    """Largest error as a multiple of what is allowed; infinite for NaN and for an error where none is allowed."""
    truth, size = x @ weight.t(), (x.abs() + moved) @ weight.abs().t()
    allowed = (x.shape[-1] + 8) * 2.0**-24 * size + torch.finfo(dtype).eps * truth.abs() + moved @ weight.abs().t()
    error = (y - truth).abs()
    return torch.where(error == 0, 0.0, error / allowed).nan_to_num(float("inf"), posinf=float("inf")).max().item()
