"""Which activation sparsity gives a wanted speed-up at decode, from the kernels' times on this machine.

Measured are the distinct products of a token (products.py), without skipping and with some shares skipped. Skipping
more is taken to be no slower (the nearest such curve), and times of other shares lie on straight lines between. All
maps skip the same share, as a policy does on the mean. The speed-up is over the same checkpoint without the policy, of
all products of a token, those that skip nothing among them. Attention over the cache and experts are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...errors import RecipeError
from .products import SHARES, Product

Times = tuple[float, Sequence[float]]  # without skipping, and with each of SHARES skipped


def sparsity_for(
    counts: Mapping[Product, int],
    measure: Callable[[Product], Times],
    reachable: float,
    speedup: float,
    log: Callable[[str], None],
    watched: float = 0.0,
) -> float:
    """The lowest sparsity at which the products of a token take 1 / `speedup` of their time without skipping.

    `reachable`: sparsity of a policy that skips all it can. `watched`: share of the tokens that skip nothing (both
    figures are over all tokens). RecipeError, with what is reachable, when no sparsity does.
    """
    table = {product: measure(product) for product in counts}
    smooth = {product: (dense, falling(sparse)) for product, (dense, sparse) in table.items()}
    reached = {k / 100 * reachable: expected(smooth, counts, k / 100, watched) for k in range(1, 91)}
    log("expected speed-up of the linear maps by activation sparsity: " + described(reached))
    for sparsity, factor in reached.items():
        if factor >= speedup:
            return sparsity
    highest, best = list(reached.items())[-1]
    raise RecipeError(
        f"no activation sparsity makes this model's linear maps {speedup:g} times as fast here: {highest:.0%} gives "
        f"{best:.2f} times",
        hint=f"ask for at most {int(best * 100) / 100:g}"
        if best >= 1.01
        else "nothing is gained on this machine, whatever is asked for: matrices are too small, or lie in its caches; "
        "give a sparsity instead",
    )


def expected(table: Mapping[Product, Times], counts: Mapping[Product, int], share: float, watched: float) -> float:
    """Speed-up when every product that can skip does skip `share`, for all tokens but a share `watched`."""
    dense = sparse = 0.0
    for product, count in counts.items():
        without, times = table[product]
        dense += count * without
        sparse += count * (_at(times, share) if times else without)
    return dense / (watched * dense + (1 - watched) * sparse)


def falling(times: Sequence[float]) -> list[float]:
    """The nearest curve, by least squares, that never rises."""
    pools: list[tuple[float, int]] = []
    for value in times:
        mean, count = value, 1
        while pools and pools[-1][0] < mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def described(reached: Mapping[float, float]) -> str:
    """A few of the figures."""
    every = list(reached.items())
    return ", ".join(f"{sparsity:.0%} {factor:.2f}x" for sparsity, factor in (every[k] for k in (29, 49, 69, 89)))


def _at(times: Sequence[float], share: float) -> float:
    points = list(zip(SHARES, times, strict=True))
    for (low, first), (high, second) in zip(points, points[1:], strict=False):
        if share <= high:
            return first + (share - low) / (high - low) * (second - first)
    return times[-1]
