"""Better plans by measurement: the solver's losses are scaled head by head, and what helps stays.

Influence is a first order, one head at a time. What it misses (heads that depend on each other, large changes) shows
when a plan runs. Each step scales every head's losses by a random factor, solves again, so that the plan keeps to the
budget and is the best for these losses, and measures it on calibration sequences; factors that lower the divergence are
the next starting point. Nothing here looks at held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ...attention.rivals import Rules
from ...attention.solver import Problem, solve
from .candidates import Candidate, best_sinks, problem_of, rules_of
from .profile import Profile
from .settings import Settings

SPREAD = 0.5  # of the logarithms of the factors
STEP_TIME_S = 5.0
NEAR_ENOUGH = 1e-3  # to the LP bound


def refine(
    settings: Settings,
    profiles: Mapping[int, Profile],
    start: Candidate,
    measure: Callable[[Rules], float],
    seed: int,
) -> Candidate:
    """`start`, or the best plan found in as many steps as the stage allows; `measure` gives what is to be small."""
    assert start.loss is not None
    small, pick = best_sinks(problem_of(settings, profiles, start.loss))
    even = 1 / np.maximum(small.losses.max(2).sum(1), 1e-300)
    draw = np.random.default_rng(seed)
    heads, lengths = np.zeros(small.losses.shape[1]), np.zeros(len(even))
    best, least = start, measure(start.rules)
    tried = {start.rules}
    for _ in range(settings.stage.refine):
        by_head = heads + SPREAD * draw.standard_normal(len(heads))
        by_length = lengths + SPREAD * draw.standard_normal(len(lengths))
        scaled = Problem(small.losses * np.exp(by_head)[None, :, None], small.costs, small.budgets)
        solution = solve(scaled, even * np.exp(by_length), time_limit=STEP_TIME_S, gap=NEAR_ENOUGH)
        if solution is None:
            continue
        rules = rules_of(settings, pick, solution, 1)
        if rules in tried:
            continue
        tried.add(rules)
        found = measure(rules)
        if found < least:
            best, least = Candidate(f"{start.name}, refined", rules, solution, start.loss), found
            heads, lengths = by_head, by_length
    return best
