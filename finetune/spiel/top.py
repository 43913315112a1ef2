"""The largest of many numbers that come in pieces, in memory for the largest only."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.entries.dispatch import entries_beyond

STRIDE = 61  # of a sample; odd, so that it meets all columns of a matrix


class TopPool:
    """Keeps the `capacity` largest in magnitude of what it is offered, never zeros; of equal ones the lower position.

    Attributes:
        position: int64, ascending where they were offered so.
        value: with their signs.
        floor: no magnitude up to this can enter any more.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.position = torch.empty(0, dtype=torch.int64, device=device)
        self.value = torch.empty(0, device=device)
        self.floor = 0.0

    def offer(
        self, first: int, matrix: Tensor, floor: float = 0.0, weights: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """matrix [rows, cols] of positions from `first` on, row by row, times weights of its rows and columns.

        Magnitudes that do not exceed `floor` are passed by.
        """
        if not self.capacity:
            return
        floor = max(floor, self.floor)
        guess = _below_the_largest(_sample(matrix, weights), self.capacity) if floor == 0 else 0.0
        position, value = entries_beyond(matrix, max(floor, guess), weights)
        if guess and len(position) < self.capacity:
            position, value = entries_beyond(matrix, floor, weights)
        if len(position) > self.capacity:  # sort no more than can stay
            size = value.abs()
            stays = size >= size.topk(self.capacity, sorted=False).values.min()
            position, value = position[stays], value[stays]
        self.add(position + first, value)

    def add(self, position: Tensor, value: Tensor) -> None:
        """Numbers [n] at any positions that are not in the pool."""
        if not self.capacity:
            return
        self.position = torch.cat([self.position, position])
        self.value = torch.cat([self.value, value.to(self.value.dtype)])
        if len(self.position) > self.capacity:
            keep = best(self.position, self.value.abs(), self.capacity)
            self.position, self.value = self.position[keep], self.value[keep]
            self.floor = float(self.value.abs().min())


def _sample(matrix: Tensor, weights: tuple[Tensor, Tensor] | None) -> Tensor:
    """Weighted magnitudes of one entry in STRIDE."""
    size = matrix.reshape(-1)[::STRIDE].abs()
    if weights is None:
        return size
    place, width = torch.arange(0, matrix.numel(), STRIDE, device=matrix.device), matrix.shape[1]
    return size * weights[1][place % width] * weights[0][place // width]


def _below_the_largest(sample: Tensor, count: int) -> float:
    """A number that likely is below the `count` largest and above most others, from one in STRIDE; else 0."""
    expected = count / STRIDE
    least = int(expected + 4 * expected**0.5) + 8
    return float(sample.topk(least, sorted=False).values.min()) if 8 * least < len(sample) else 0.0


def best(position: Tensor, score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, in ascending order of position; ties go to the lower position.

    What is not a number is higher than all.
    """
    order = position.argsort()
    return order[highest(score[order], count)]


def highest(score: Tensor, count: int) -> Tensor:
    """The same where positions ascend already: no sort."""
    if len(score) <= count or not count:
        return torch.arange(min(count, len(score)), device=score.device)
    score = score.nan_to_num(torch.inf, torch.inf)
    if score.device.type == "cpu":
        least = score.kthvalue(len(score) - count + 1).values
    else:  # where torch refuses kthvalue under deterministic algorithms
        least = score.topk(count, sorted=False).values.min()
    chosen = score > least
    chosen[(score == least).nonzero().flatten()[: count - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()
