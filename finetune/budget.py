"""How many trainable entries there are and how they are shared out. Pure functions of shapes.

ERK: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science", Nature Communications 2018, and Evci et al., "Rigging the Lottery", ICML 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import RecipeError

ALLOCATIONS = ("uniform", "erk", "global")
DEFAULT_DENSITY = 0.01
CEILING = 4.0  # of a layer's uniform share, under "global"
FLOOR = 0.1


def check_budget(density: float | None, num_weights: int | None, rank_equivalent: float | None) -> None:
    """RecipeError unless at most one is given and it is positive; a density at most 1, a count a whole number."""
    given = {"density": density, "num_weights": num_weights, "rank_equivalent": rank_equivalent}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise RecipeError(
            f"{' and '.join(named)} are both given; allowed: one of {', '.join(given)}",
            hint="they are three ways to say how many entries are trained",
        )
    for name in named:
        if isinstance(given[name], bool) or not isinstance(given[name], (int, float)):
            raise RecipeError(f"{name} must be a number, got {given[name]!r}")
    if density is not None and not 0 < density <= 1:
        raise RecipeError(
            f"density must be in (0, 1], got {density:g}",
            hint="it is the fraction of the adapted weights that is trained: 0.01 trains one in a hundred",
        )
    for name, value in (("num_weights", num_weights), ("rank_equivalent", rank_equivalent)):
        if value is not None and not 0 < value < math.inf:
            raise RecipeError(f"{name} must be greater than 0, got {value:g}")
    if num_weights is not None and not isinstance(num_weights, int):
        raise RecipeError(
            f"num_weights must be a whole number, got {num_weights!r}", hint="density takes a share of the weights"
        )


def total(
    shapes: Sequence[tuple[int, int]],
    density: float | None = None,
    num_weights: int | None = None,
    rank_equivalent: float | None = None,
) -> int:
    """Entries for all layers together; DEFAULT_DENSITY where nothing is given.

    Args:
        shapes: (out, in) of every adapted layer.
        density: of all their weights, rounded to the nearest count, at least one.
        num_weights: the count itself.
        rank_equivalent: as many as LoRA of this rank trains on the same layers: r * sum of (in + out).

    Raises:
        RecipeError: more entries than there are weights.
    """
    check_budget(density, num_weights, rank_equivalent)
    size = sum(rows * cols for rows, cols in shapes)
    if num_weights is not None:
        count, said = num_weights, f"num_weights {num_weights}"
    elif rank_equivalent is not None:
        count = round(rank_equivalent * sum(rows + cols for rows, cols in shapes))
        said = f"rank_equivalent {rank_equivalent:g}, {count} entries,"
    else:
        density = DEFAULT_DENSITY if density is None else density
        count, said = max(1, round(density * size)), f"density {density:g}"
    if count > size:
        raise RecipeError(
            f"{said} is more than the {size} weights of the adapted layers", hint="adapt more layers, or ask for less"
        )
    return count


def share_out(count: int, shapes: Sequence[tuple[int, int]], room: Sequence[int], allocation: str) -> list[int]:
    """Entries per layer, `count` in all, none above its `room`.

    Args:
        count: at most sum(room).
        room: entries that each layer can take: all of it, or those that a mask allows.
        allocation: "uniform" gives every layer the same share of its room; "erk" a density in proportion to
            (in + out) / (in * out), so narrow layers get more. "global" starts uniform: it is decided by scores.

    Raises:
        RecipeError: `count` is more than there is room for, or the allocation is unknown.
    """
    if allocation not in ALLOCATIONS:
        raise RecipeError(f"allocation {allocation!r} is unknown; allowed: {', '.join(ALLOCATIONS)}")
    if count > sum(room):
        raise RecipeError(
            f"{count} entries asked for, the masks allow {sum(room)} in the adapted layers",
            hint="lower the density, or train on all positions",
        )
    if allocation == "erk":
        weights = [(rows + cols) * r / (rows * cols) for (rows, cols), r in zip(shapes, room, strict=True)]
    else:
        weights = [float(r) for r in room]
    return proportional(count, weights, room)


def proportional(count: int, weights: Sequence[float], room: Sequence[int]) -> list[int]:
    """`count` whole numbers in proportion to `weights`, each at most its `room`; what overflows goes to the others."""
    given = [0] * len(weights)
    full: set[int] = set()
    while True:
        rest = count - sum(room[i] for i in full)
        free = [i for i in range(len(weights)) if i not in full]
        mass = math.fsum(weights[i] for i in free)
        exact = {i: rest * weights[i] / mass if mass else 0.0 for i in free}
        over = {i for i in free if exact[i] >= room[i]}
        for i in over:
            given[i] = room[i]
        if not over:
            break
        full |= over
    for i in exact:
        given[i] = math.floor(exact[i])
    short = count - sum(given)
    by_remainder = sorted(exact, key=lambda i: (given[i] - exact[i], i))
    for i in by_remainder[:short]:
        given[i] += 1
    return given
