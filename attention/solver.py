"""One rule per head, least predicted loss, within a budget of kept tokens at every length.

    minimise   sum_h c[h, r(h)]
    subject to sum_h cost[b, h, r(h)] <= budget[b]      for every length b
               sum_h loss[m, h, r(h)] <= limit[m]       for other objectives (epsilon constraints)

Its LP relaxation is nearly integral: a vertex has no more fractional heads than there are coupling constraints. The
default is therefore the LP, and a small integer program over the fractional heads and some others around it; its gap to
the LP bound is recorded. The whole integer program can be asked for instead. Both run in scipy's HiGHS; an incumbent
that a time limit interrupts is kept. HiGHS looks at the clock between its steps only, and the first steps of the whole
program take several times as long as the relaxation: with less time than that it is not begun.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from .programs import GAP, Array, OutOfTime, integer, relax, scaled, undominated

TIME_LIMIT_S = 60.0
FIRST_REPAIR = 40  # heads that the repair may change beside the fractional ones; doubled until it is good enough
BANDS = 4
PARETO_GAP = 1e-4
WHOLE = 4.0  # times the relaxation's: the least time that the whole integer program is begun with
_SLACK = 1e-9


@dataclass(frozen=True)
class Solution:
    """A choice and what is known about it.

    Attributes:
        choice: int64 [heads], index of each head's rule.
        objective: its value of what was minimised.
        bound: of the LP relaxation (without time for it: of each head's best rule); no choice is below it.
        losses: predicted loss of every objective, [M].
        status: "optimal" (proved, or as near to the bound as was asked), "feasible", or "time limit".
        seconds: of the solver.
    """

    choice: NDArray[np.int64]
    objective: float
    bound: float
    losses: Array
    status: str
    seconds: float

    @property
    def gap(self) -> float:
        """(objective - bound) / |bound|; 0 where both are 0."""
        return max(self.objective - self.bound, 0.0) / max(abs(self.bound), 1e-300) if self.objective else 0.0


@dataclass(frozen=True)
class Problem:
    """Float64 losses [M, heads, rules], costs [B, heads, rules] and budgets [B]."""

    losses: Array
    costs: Array
    budgets: Array

    def __post_init__(self) -> None:
        m, heads, rules = self.losses.shape
        if self.costs.shape != (len(self.budgets), heads, rules):
            raise ValueError(f"costs are {self.costs.shape}, expected {(len(self.budgets), heads, rules)}")
        if not (np.isfinite(self.losses).all() and np.isfinite(self.costs).all()):
            raise ValueError("losses and costs must be finite")

    def check_reachable(self, lengths: Sequence[int]) -> None:
        """RecipeError unless the cheapest rules fit every budget; `lengths` name the budgets."""
        for length, costs, budget in zip(lengths, self.costs, self.budgets, strict=True):
            least = costs.min(1).sum()
            if least > budget + _SLACK:
                raise RecipeError(
                    f"no plan reaches density {budget / (length * costs.shape[0]):.3g} at length {length}: the "
                    f"cheapest rules keep {least / (length * costs.shape[0]):.3g}",
                    hint="ask for a larger density, or allow a smaller block or fewer sinks",
                )

    def tied(self, heads: int) -> Problem:
        """The problem where each run of `heads` consecutive heads shares one rule."""
        total = lambda x: x.reshape(x.shape[0], -1, heads, x.shape[2]).sum(2)
        return Problem(total(self.losses), total(self.costs), self.budgets)


def solve(
    problem: Problem,
    weights: Array | None = None,
    limits: Array | None = None,
    *,
    full: bool = False,
    time_limit: float = TIME_LIMIT_S,
    whole_limit: float = float("inf"),
    gap: float = GAP,
) -> Solution | None:
    """The choice with the least weighted loss; None when the limits leave none.

    Args:
        weights: [M] of the objectives; all 1 where not given.
        limits: [M], upper bound of each objective's loss; inf = none.
        full: the whole integer program instead of LP and repair.
        gap: relative to the LP bound, that is good enough.
        time_limit: seconds for everything; what was found until then is returned with the status "time limit".
        whole_limit: seconds of them for the whole integer program.
    """
    started = time.monotonic()
    weights = np.ones(len(problem.losses)) if weights is None else weights
    rows, bounds = [problem.costs], [problem.budgets]
    if limits is not None and np.isfinite(limits).any():
        binding = np.isfinite(limits)
        rows.append(problem.losses[binding])
        bounds.append(limits[binding])
    coupling, upper = scaled(np.concatenate(rows), np.concatenate(bounds))
    c = np.tensordot(weights, problem.losses, 1)
    keep = undominated(c, coupling)
    left = lambda: max(time_limit - (time.monotonic() - started), 0.0)
    x: Array | None
    late = lambda: left() == 0
    try:
        relaxed = relax(c, coupling, upper, keep, time_limit)
        if relaxed is None:
            return None
        (x, bound), relaxing = relaxed, time.monotonic() - started
        choice, proved = _repair(c, coupling, upper, keep, x, bound, left, late, gap)
        whole_limit = min(left(), whole_limit)
        if full and whole_limit >= WHOLE * relaxing:
            better, whole = integer(c, coupling, upper, keep, whole_limit, gap)
            if better is not None and (choice is None or _value(c, better) < _value(c, choice)):
                choice = better
            proved = proved or whole
    except OutOfTime:
        x, bound, choice, proved = None, float(c.min(1).sum()), None, False
    stopped = x is None or late()
    if choice is None and stopped:
        choice = _last_resort(coupling, upper, x)
    if choice is None:
        return None
    objective = _value(c, choice)
    heads = np.arange(len(choice))
    good = objective - bound <= gap * abs(bound) + 1e-12
    return Solution(
        choice=choice,
        objective=objective,
        bound=bound,
        losses=problem.losses[:, heads, choice].sum(1),
        status="optimal" if good or proved else "time limit" if stopped else "feasible",
        seconds=time.monotonic() - started,
    )


def pareto(problem: Problem, *, full: bool = False, time_limit: float = TIME_LIMIT_S) -> list[Solution]:
    """Choices that no other found one beats at every length, by the sum of their losses in units of the best.

    Each objective alone, their normalised sum, and each objective under four bands of limits on the others (MoA's
    epsilon constraints). `time_limit` is that of all; the whole integer programs of the single objectives share it.
    What was found until then is returned. Empty: nothing fits, or nothing was found in time.
    """
    ends = time.monotonic() + time_limit
    left = lambda: max(ends - time.monotonic(), 0.0)
    m = len(problem.losses)
    found: list[Solution] = []
    for k in range(m):
        share = left() / (m - k)
        alone = solve(problem, np.eye(m)[k], full=full, time_limit=left(), whole_limit=share, gap=PARETO_GAP)
        found += [alone] if alone is not None else []
    if not found or m == 1:
        return found
    table = np.stack([solution.losses for solution in found])
    low, high = table.min(0), table.max(0)
    scale = np.where(low > 0, low, np.where(high > 0, high, 1.0))
    bands = [np.linspace(low[k], high[k], BANDS + 1)[1:] for k in range(m)]
    tasks: list[tuple[Array, Array | None]] = [(1 / scale, None)]
    for k in range(m):
        others = [j for j in range(m) if j != k and high[j] > low[j]]
        for combination in itertools.product(*(bands[j] for j in others)):
            limits = np.full(m, np.inf)
            limits[others] = combination
            tasks.append((np.eye(m)[k], limits))
    for weights, upper in tasks:
        if left() <= 0:
            break
        solution = solve(problem, weights, upper, full=full, time_limit=left(), gap=PARETO_GAP)
        if solution is not None:
            found.append(solution)
    unique = list({tuple(solution.choice.tolist()): solution for solution in found}.values())
    kept = [a for a in unique if not any(_beats(b.losses, a.losses) for b in unique)]
    return sorted(kept, key=lambda solution: float((solution.losses / scale).sum()))


def _beats(a: Array, b: Array) -> bool:
    return bool((a <= b).all() and (a < b).any())


def _value(c: Array, choice: NDArray[np.int64]) -> float:
    return float(c[np.arange(len(choice)), choice].sum())


def _repair(
    c: Array,
    coupling: Array,
    upper: Array,
    keep: NDArray[np.bool_],
    x: Array,
    bound: float,
    left: Callable[[], float],
    late: Callable[[], bool],
    gap: float,
) -> tuple[NDArray[np.int64] | None, bool]:
    """(choice, whether optimal): heads that the LP leaves fractional and the least certain others, solved exactly."""
    settled = x.max(1) > 1 - 1e-6
    choice = x.argmax(1)
    # How little it would cost to move a head to its next best rule: those are worth reconsidering.
    regret = np.where(keep, c, np.inf)
    own = c[np.arange(len(choice)), choice]
    np.put_along_axis(regret, choice[:, None], np.inf, 1)
    order = np.argsort(np.where(settled, np.abs(regret - own[:, None]).min(1), -1.0), kind="stable")
    best: NDArray[np.int64] | None = None
    wide = int((~settled).sum()) + FIRST_REPAIR
    while True:
        free = np.sort(order[:wide])
        fixed = np.setdiff1d(np.arange(len(choice)), free)
        rest = upper - coupling[:, fixed, choice[fixed]].sum(1)
        part, proved = integer(c[free], coupling[:, free], rest, keep[free], left(), gap)
        if part is not None:
            candidate = choice.copy()
            candidate[free] = part
            if best is None or _value(c, candidate) < _value(c, best):
                best = candidate
            if _value(c, best) - bound <= gap * abs(bound) + 1e-12:
                return best, True
        whole = wide >= len(choice)
        if whole or late() or (best is not None and wide >= 4 * FIRST_REPAIR + int((~settled).sum())):
            return best, whole and proved
        wide *= 2


def _last_resort(coupling: Array, upper: Array, x: Array | None) -> NDArray[np.int64] | None:
    """What a relaxation settles, and the cheapest rules elsewhere; where that does not fit, the cheapest everywhere."""
    cheapest = coupling.sum(0).argmin(1)
    tries = [cheapest] if x is None else [np.where(x.max(1) > 1 - 1e-6, x.argmax(1), cheapest), cheapest]
    heads = np.arange(len(cheapest))
    fits = (choice for choice in tries if (coupling[:, heads, choice].sum(1) <= upper + _SLACK).all())
    return next(fits, None)
