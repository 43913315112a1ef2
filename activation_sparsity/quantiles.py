"""Thresholds from scores: the value below which a given share of the entries lies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

POINTS = 1000  # shares that are kept, besides 0
LARGEST = 1 << 20  # entries that are sorted; of more, every so many rows are taken


def counted_rows(scores: Tensor) -> Tensor:
    """The rows [tokens, in] that a quantile of these scores is taken from."""
    return scores[:: max(1, -(-scores.numel() // LARGEST))]


def quantile(scores: Tensor, share: float) -> float:
    """The value that a share in [0, 1] of the scores [tokens, in] >= 0 does not exceed; -1 for none of them."""
    if share <= 0:
        return -1.0
    values = counted_rows(scores).flatten()
    place = min(max(1, round(share * values.numel())), values.numel())
    if values.device.type != "cpu":
        return float(values.kthvalue(place).values)
    return float(np.partition(values.numpy(), place - 1)[place - 1])  # the same value, four times as fast


class Quantiles:
    """Of scores [tokens, in] >= 0, all entries together: `at(p)` is the value that a share p of them does not exceed.

    At p = 0 it is -1: nothing is dropped, zeros included.
    """

    def __init__(self, scores: Tensor) -> None:
        values = counted_rows(scores).flatten().float().sort().values
        places = torch.linspace(0, 1, POINTS + 1, dtype=torch.float64) * values.numel()
        self.values = values[(places.ceil().long() - 1).clamp(0, values.numel() - 1).to(values.device)].cpu()

    def at(self, share: float) -> float:
        """The threshold for a share in [0, 1], between the points a straight line."""
        if share <= 0:
            return -1.0
        place = min(share, 1.0) * POINTS
        low = int(place)
        if low >= POINTS:
            return float(self.values[-1])
        a, b = float(self.values[low]), float(self.values[low + 1])
        return a + (place - low) * (b - a)
