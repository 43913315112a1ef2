"""The largest of many numbers that come in pieces, in memory for the largest only."""

from __future__ import annotations

import torch
from torch import Tensor

STRIDE = 61  # of a sample; odd, so that it meets all columns of a matrix


class TopPool:
    """Keeps the `capacity` largest in magnitude of what it is offered, never zeros; of equal ones the lower position.

    Attributes:
        position: int64, in no particular order.
        value: with their signs.
        floor: no magnitude up to this can enter any more.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.position = torch.empty(0, dtype=torch.int64, device=device)
        self.value = torch.empty(0, device=device)
        self.floor = 0.0

    def offer(self, first: int, values: Tensor, floor: float = 0.0) -> None:
        """values [n] of positions first ... first + n - 1; magnitudes that do not exceed `floor` are passed by."""
        if not self.capacity:
            return
        size, floor = values.abs(), max(floor, self.floor)
        guess = _below_the_largest(size, self.capacity) if floor == 0 else 0.0
        fit = _where(size > max(floor, guess))
        if guess and len(fit) < self.capacity:
            fit = _where(size > floor)
        if len(fit) > self.capacity:  # sort no more than can stay
            least = size[fit].topk(self.capacity, sorted=False).values.min()
            fit = fit[size[fit] >= least]
        self.add(fit + first, values[fit])

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


def _below_the_largest(size: Tensor, count: int) -> float:
    """A number that likely is below the `count` largest and above most others, from one in STRIDE; else 0."""
    expected = count / STRIDE
    least = int(expected + 4 * expected**0.5) + 8
    sample = size[::STRIDE]
    return float(sample.topk(least, sorted=False).values.min()) if 8 * least < len(sample) else 0.0


def _where(chosen: Tensor) -> Tensor:
    """Indices of the few that are true, [n] bool, ascending: words of eight are searched first, four times as fast."""
    whole = len(chosen) // 8 * 8
    words = chosen[:whole].view(torch.int64).nonzero()
    places = 8 * words + torch.arange(8, device=chosen.device)
    rest = chosen[whole:].nonzero().flatten() + whole
    return torch.cat([places[chosen[:whole].view(-1, 8)[words.flatten()]], rest])


def best(position: Tensor, score: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, in ascending order of position; ties go to the lower position.

    What is not a number is higher than all.
    """
    if len(score) <= count:
        return position.argsort()
    score = score.nan_to_num(torch.inf, torch.inf)
    least = score.topk(count, sorted=False).values.min() if count else torch.inf
    higher, equal = (score > least).nonzero().flatten(), (score == least).nonzero().flatten()
    equal = equal[position[equal].argsort()][: count - len(higher)]
    chosen = torch.cat([higher, equal])
    return chosen[position[chosen].argsort()]
