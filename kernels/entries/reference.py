"""The same in plain torch, for any device and float dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of rows and columns."""
    squares = matrix.to(torch.float32).square()
    return squares.sum(1), squares.sum(0)


def entries_beyond(matrix: Tensor, floor: float, weights: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Positions and weighted values of what exceeds the floor."""
    weighted = matrix if weights is None else (matrix * weights[1]).mul_(weights[0].unsqueeze(1))
    flat = weighted.reshape(-1)
    position = _true_places(flat.abs() > floor)
    return position, flat[position]


def _true_places(chosen: Tensor) -> Tensor:
    """Indices of the few that are true, [n] bool, ascending: words of eight are searched first, four times as fast."""
    whole = len(chosen) // 8 * 8
    words = chosen[:whole].view(torch.int64).nonzero()
    places = 8 * words + torch.arange(8, device=chosen.device)
    rest = chosen[whole:].nonzero().flatten() + whole
    return torch.cat([places[chosen[:whole].view(-1, 8)[words.flatten()]], rest])
