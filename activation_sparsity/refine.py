"""Budgets refined by what they really cost: the loss of the whole model, weight for weight, greedily.

In a round every group of sites is tried with `step` more sparsity; the loss that this costs per skipped weight is its
price. Then the dearer half gives sparsity to the cheaper half, as many weights as it takes, in the largest of a few
moves that lowers the loss. The number of skipped weights stays the same to rounding throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

STEP = 0.1
ROUNDS = 3
MOVES = (1.0, 0.5, 0.25)
HIGHEST = 0.95

Shares = Mapping[str, float]


class Loss(Protocol):
    """The loss under shares; `base`: those that the next ones are compared with."""

    def __call__(self, shares: Shares, *, base: bool = False) -> float: ...


def refine(
    shares: Shares,
    sizes: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    loss: Loss,
    rounds: int = ROUNDS,
    log: Callable[[str], None] = lambda _: None,
    floors: Shares | None = None,
) -> dict[str, float]:
    """Shares by site with a lower `loss` and the same number of skipped weights; none below its floor."""
    best, lowest, step, floors = dict(shares), math.inf, STEP, floors or {}
    found = True
    for number in range(rounds):
        if found:
            lowest = loss(best, base=True)
        prices = {}
        for k, group in enumerate(groups):
            trial = _moved(best, dict.fromkeys(group, step), floors)
            gained = _weights(trial, sizes) - _weights(best, sizes)
            prices[k] = (loss(trial) - lowest) / gained if gained > 0 else float("inf")
        order = sorted(prices, key=lambda k: prices[k])
        found = False
        for move in MOVES:
            middle = (len(order) - 1) / 2
            changes = {
                name: move * step * (middle - place) / max(middle, 1.0)
                for place, k in enumerate(order)
                for name in groups[k]
            }
            trial = balanced(_moved(best, changes, floors), sizes, _weights(best, sizes), floors)
            value = loss(trial)
            if value < lowest:
                best, lowest, found = trial, value, True
                break
        log(f"budgets, round {number + 1} of {rounds}: loss {lowest:.4f}")
        if not found:
            step /= 2
    return best


def balanced(
    shares: Shares, sizes: Mapping[str, int], weights: float, floors: Shares | None = None
) -> dict[str, float]:
    """All shares moved by one amount, within [floor or 0, HIGHEST], so that `weights` weights are skipped."""
    floors = floors or {}
    low, high = -1.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _weights(_moved(shares, dict.fromkeys(shares, middle), floors), sizes) < weights:
            low = middle
        else:
            high = middle
    return _moved(shares, dict.fromkeys(shares, high), floors)


def grouped(names: Sequence[str], most: int) -> list[list[str]]:
    """Sites (in model order) in at most `most` groups: neighbours of one kind (the name without numbers)."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        kinds.setdefault(kind, []).append(name)
    parts = max(1, most // max(1, len(kinds)))
    groups = []
    for members in kinds.values():
        count = min(parts, len(members))
        bounds = [round(k * len(members) / count) for k in range(count + 1)]
        groups += [members[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return groups


def _moved(shares: Shares, changes: Shares, floors: Shares) -> dict[str, float]:
    return {
        name: max(floors.get(name, 0.0), min(HIGHEST, max(0.0, share + changes.get(name, 0.0))))
        for name, share in shares.items()
    }


def _weights(shares: Shares, sizes: Mapping[str, int]) -> float:
    return sum(share * sizes[name] for name, share in shares.items())
