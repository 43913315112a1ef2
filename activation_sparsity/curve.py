"""Error against sparsity of one site, measured on a grid, and budgets over many sites made from such curves."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GRID = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
STEPS = 60  # of a bisection


@dataclass(frozen=True)
class Curve:
    """`errors[k]` >= 0 at `sparsities[k]`, both rising; between the points a straight line. `size`: weights.

    `free`: the share of inputs that are zero anyway, as behind a ReLU.
    """

    sparsities: Sequence[float]
    errors: Sequence[float]
    size: int
    free: float = 0.0

    def error(self, sparsity: float) -> float:
        """The error at a sparsity."""
        return _interpolate(self.sparsities, self.errors, sparsity)

    def sparsity(self, error: float) -> float:
        """The largest sparsity whose error is at most `error`."""
        return _interpolate(self.errors, self.sparsities, error)

    def slope(self, sparsity: float) -> float:
        """d error / d sparsity, to the right."""
        k = min(bisect.bisect_right(self.sparsities, sparsity), len(self.sparsities) - 1)
        width = self.sparsities[k] - self.sparsities[k - 1]
        return (self.errors[k] - self.errors[k - 1]) / width if width else 0.0


def rising(errors: Sequence[float]) -> list[float]:
    """The same, with every error at least as large as the one before: sampled curves may dip."""
    found: list[float] = []
    for error in errors:
        found.append(max(error, found[-1] if found else 0.0))
    return found


def convex(curve: Curve) -> Curve:
    """The lower convex hull: what marginal errors can be compared on."""
    hull: list[tuple[float, float]] = []
    for point in zip(curve.sparsities, curve.errors, strict=True):
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return Curve([s for s, _ in hull], [e for _, e in hull], curve.size, curve.free)


def equal_error(curves: Mapping[str, Curve], weights: float) -> tuple[dict[str, float], float]:
    """One error for all sites at which they skip `weights` weights together: (sparsity by site, the error)."""
    low, high = 0.0, max((curve.errors[-1] for curve in curves.values()), default=0.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _skipped(curves, {name: c.sparsity(middle) for name, c in curves.items()}) < weights:
            low = middle
        else:
            high = middle
    return {name: curve.sparsity(high) for name, curve in curves.items()}, high


def least_total(curves: Mapping[str, Curve], weights: float) -> dict[str, float]:
    """The sparsities at which `weights` weights are skipped with the least sum of errors (water filling).

    On the convex hulls the segments with the smallest error per weight are taken first, the last one in part.
    """
    hulls = {name: convex(curve) for name, curve in curves.items()}
    segments = []
    for name, hull in hulls.items():
        for k in range(1, len(hull.sparsities)):
            width = (hull.sparsities[k] - hull.sparsities[k - 1]) * hull.size
            if width > 0:
                segments.append(((hull.errors[k] - hull.errors[k - 1]) / width, name, k, width))
    result = {name: hull.sparsities[0] for name, hull in hulls.items()}
    left = weights - _skipped(curves, result)
    for _, name, k, width in sorted(segments):
        if left <= 0:
            break
        share = min(1.0, left / width)
        start, end = hulls[name].sparsities[k - 1], hulls[name].sparsities[k]
        result[name] = start + share * (end - start)
        left -= share * width
    return result


def _skipped(curves: Mapping[str, Curve], sparsities: Mapping[str, float]) -> float:
    return sum(curve.size * sparsities[name] for name, curve in curves.items())


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x on the line through the points, the last one where several share an x; constant outside."""
    k = bisect.bisect_right(xs, x)
    if k == 0:
        return ys[0]
    if k == len(xs):
        return ys[-1]
    share = (x - xs[k - 1]) / (xs[k] - xs[k - 1])
    return ys[k - 1] + share * (ys[k] - ys[k - 1])
