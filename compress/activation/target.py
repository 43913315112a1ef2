"""The highest sparsity within a limit of the perplexity: PPL-p% of the Sparsing Law (Luo et al. 2024), for any policy.

The increase of the perplexity over the dense model is measured on validation windows that calibration does not see,
paired per window. What must stay within the limit is that increase plus its standard error, so that other text of the
kind is likely to stay within it too. Its logarithm is nearly a straight line in the logit of the sparsity; the search
follows it, keeps a bracket, and stops within SLACK of the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ...activation_sparsity.base import Policy
from ...errors import RecipeError

SLACK = 0.1  # of the limit: (1 - SLACK) to 1 times it is good enough
MOST = 8  # policies that are made
LOWEST, FIRST = 0.02, 0.3


@dataclass(frozen=True)
class Found:
    """A policy with its increase of the perplexity and the standard error of that on validation text."""

    sparsity: float
    policy: Policy
    increase: float
    error: float

    @property
    def bound(self) -> float:
        """What the increase on other text of the kind exceeds one time in six."""
        return self.increase + self.error


def highest_sparsity(
    make: Callable[[float], Policy],
    measure: Callable[[Policy], tuple[float, float]],
    limit: float,
    highest: float,
    log: Callable[[str], None] = lambda _: None,
) -> Found:
    """The policy of the highest sparsity found whose increase, with its standard error, is at most `limit`.

    RecipeError, with what is reachable, when even LOWEST costs more.
    """
    low, high = 0.0, min(highest, 0.97)
    best: Found | None = None
    least: Found | None = None
    points: list[tuple[float, float]] = []
    sparsity = min(FIRST, high)
    for _ in range(MOST):
        policy = make(sparsity)
        found = Found(sparsity, policy, *measure(policy))
        log(f"sparsity {sparsity:.1%}: perplexity {found.increase:+.2%} ± {found.error:.2%} on validation text")
        points.append((sparsity, found.bound))
        if least is None or found.bound <= least.bound:
            least = found
        if found.bound <= limit:
            low = sparsity
            if best is None or sparsity > best.sparsity:
                best = found
            if found.bound >= (1 - SLACK) * limit or high - low < 0.002 or sparsity >= high:
                break
        else:
            high = sparsity
            if sparsity <= LOWEST:
                break
        sparsity = _next(points, limit, low, high)
    if best is None:
        assert least is not None
        raise RecipeError(
            f"no sparsity keeps the increase of the perplexity within {limit:.2%}: {least.sparsity:.1%} already costs "
            f"{least.increase:.2%} ± {least.error:.2%}",
            hint=f"ask for at least {math.ceil(least.bound * 1000) / 10:g}%, or use a larger --nsamples",
        )
    return best


def _next(points: list[tuple[float, float]], limit: float, low: float, high: float) -> float:
    """What to try next, inside the bracket; logarithms of increases over logits of sparsities.

    Between a sparsity within the limit and one beyond it: where the line through both meets the limit, or their middle
    when the last two tries lay on one side, because then the curve is none and the other end would stay for ever.
    As long as all lie on one side: the line through the two nearest, or the slope of a square.
    """
    aim = math.log(limit * (1 - SLACK / 2))
    within = max(((x, y) for x, y in points if y <= limit), default=None)
    beyond = min(((x, y) for x, y in points if y > limit), default=None)
    if within is not None and beyond is not None and 0 < within[0] < beyond[0]:
        x0, x1 = _logit(within[0]), _logit(beyond[0])
        same = len(points) > 2 and (points[-1][1] > limit) is (points[-2][1] > limit)
        if same or within[1] <= 0:
            return _sparsity((x0 + x1) / 2)
        y0, y1 = math.log(within[1]), math.log(beyond[1])
        return _inside(_sparsity(x0 + (aim - y0) * (x1 - x0) / (y1 - y0)), low, high)
    usable = sorted((abs(math.log(y) - aim), _logit(x), math.log(y)) for x, y in points if y > 0)
    slope = 2.0
    if len(usable) >= 2 and usable[0][1] != usable[1][1]:
        (_, x0, y0), (_, x1, y1) = usable[:2]
        slope = (y1 - y0) / (x1 - x0)
    if not usable or slope <= 0:
        return max(LOWEST, (low + high) / 2)
    return _inside(_sparsity(usable[0][1] + (aim - usable[0][2]) / slope), low, high)


def _inside(guess: float, low: float, high: float) -> float:
    margin = 0.05 * (high - low)
    return max(LOWEST, min(max(guess, low + margin), high - margin))


def _sparsity(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def _logit(x: float) -> float:
    x = min(max(x, 1e-4), 1 - 1e-4)
    return math.log(x / (1 - x))
