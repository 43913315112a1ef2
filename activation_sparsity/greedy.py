"""TEAL's greedy budgets inside one decoder block: equal numbers of weights per step, the least block error wins.

Liu et al. 2024, algorithm 1. Every matrix starts at sparsity 0. In every step each matrix in turn is tried with
`step` / (its share of the block's largest matrix) more sparsity; the one whose trial has the least error of the block's
output keeps it. Stops when the block as a whole has the target; the last step is cut so that it is met exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

STEP = 0.05
HIGHEST = 0.97  # of one matrix


def greedy(
    sizes: Mapping[str, int],
    target: float,
    error: Callable[[Mapping[str, float]], float],
    step: float = STEP,
    highest: float = HIGHEST,
) -> dict[str, float]:
    """Sparsity by matrix; together `target` of all weights in `sizes` (less, if all are at `highest`)."""
    largest, whole = max(sizes.values()), sum(sizes.values())
    budgets = dict.fromkeys(sizes, 0.0)
    left = target * whole
    while left > 1e-9 * whole:
        amount = min(step * largest, left)
        trials = {}
        for name in sizes:
            if budgets[name] + amount / sizes[name] <= highest + 1e-9:
                trials[name] = error({**budgets, name: budgets[name] + amount / sizes[name]})
        if not trials:
            room = {name: (highest - budgets[name]) * sizes[name] for name in sizes}
            name = max(room, key=lambda one: room[one])
            amount = min(left, room[name])
            if amount <= 1e-9 * whole:
                return budgets
        else:
            name = min(trials, key=lambda one: trials[one])
        budgets[name] += amount / sizes[name]
        left -= amount
    return budgets
