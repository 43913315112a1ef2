"""Candidate plans of every method, from a model's profiles and a budget."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...attention.plan import HeadRule
from ...attention.rivals import Rules, duo, masformer, uniform
from ...attention.solver import Problem, Solution, pareto, solve
from ...errors import RecipeError
from .profile import Profile
from .settings import Settings

LOSSES = ("group", "fisher", "moa")


@dataclass(frozen=True)
class Candidate:
    """Rules, what made them, what the solver said of them, and which predicted loss it minimised."""

    name: str
    rules: Rules
    solution: Solution | None = None
    loss: str | None = None

    @property
    def solver(self) -> dict[str, Any] | None:
        s = self.solution
        if s is None:
            return None
        return {
            "status": s.status, "gap": s.gap, "bound": s.bound, "objective": s.objective,
            "losses": s.losses.tolist(),
        }  # fmt: skip


def needs_profile(settings: Settings) -> bool:
    """Whether the method looks at the model at all."""
    return settings.stage.method in ("gossamer", "per-layer", "masformer") or (
        settings.stage.method == "duo" and settings.imported is None
    )


def candidates(settings: Settings, profiles: Mapping[int, Profile]) -> list[Candidate]:
    """At least one plan within the budget, the most promising first. RecipeError when none is.

    All searches together end at the stage's time limit: those for one plan get a sixth each, the first one the rest.
    """
    method, facts = settings.stage.method, settings.facts
    if settings.imported is not None:
        return [Candidate(method, settings.imported)]
    if method == "uniform":
        return [_even(settings)]
    if method == "duo":
        return [_by_mass(settings, profiles)]
    limit = settings.stage.time_limit
    ends = time.monotonic() + limit
    left = lambda: max(ends - time.monotonic(), 0.0)
    losses = LOSSES if settings.stage.loss == "all" else (settings.stage.loss,)
    problem_of(settings, profiles, losses[0]).check_reachable(settings.budgeted)
    if method == "masformer":
        tied = _scaled(problem_of(settings, profiles, losses[0]).tied(facts.kv_heads))
        return [Candidate(method, masformer(tied, settings.rules, facts.kv_heads, limit))]
    if method == "per-layer":
        return _search(settings, profiles, losses[0], facts.kv_heads, limit)
    # A plan that the influence does not lead to may still be the better one: validation decides.
    others = [(loss, 1) for loss in losses[1:]] + [(losses[0], facts.kv_heads)]
    found = [_search(settings, profiles, *other, min(limit / 6, left()), only_one=True) for other in others]
    first = _search(settings, profiles, losses[0], 1, left())
    return [*first, *(candidate for some in found for candidate in some), _even(settings)]


def problem_of(settings: Settings, profiles: Mapping[int, Profile], loss: str) -> Problem:
    """Losses [lengths, heads, rules] of one kind, costs and budgets at every budgeted length."""
    rules, heads = settings.rules, settings.facts.heads
    losses = np.stack([getattr(profiles[n], loss).numpy().reshape(heads, -1) for n in settings.lengths])
    kept = np.array([[rule.kept(n, settings.least) for rule in rules] for n in settings.budgeted], dtype=np.float64)
    costs = np.repeat(kept[:, None], heads, axis=1)
    return Problem(losses, costs, settings.stage.density * np.array(settings.budgeted, dtype=np.float64) * heads)


def _search(
    settings: Settings, profiles: Mapping[int, Profile], loss: str, repeat: int, seconds: float, *,
    only_one: bool = False,
) -> list[Candidate]:  # fmt: skip
    """Pareto plans where each run of `repeat` heads shares a rule, or the one with the least normalised sum."""
    problem = problem_of(settings, profiles, loss)
    problem = problem.tied(repeat) if repeat > 1 else problem
    small, pick = best_sinks(problem)
    started, full = time.monotonic(), settings.stage.solver == "full"
    if only_one:
        single = solve(small, 1 / np.maximum(small.losses.max(2).sum(1), 1e-300), full=full, time_limit=seconds)
        found = [single] if single is not None else []
    else:
        found = pareto(small, full=full, time_limit=seconds)[: settings.stage.candidates]
    if not found and time.monotonic() - started >= seconds:
        raise RecipeError(
            f"no plan of density {settings.stage.density:g} was found in the time that the solver had",
            hint="raise --time-limit, or ask for a larger density",
        )
    if not found:
        raise RecipeError(
            f"no plan reaches density {settings.stage.density:g} at every length",
            hint="ask for a larger density, or name fewer lengths",
        )
    name = "per-layer" if repeat > 1 else f"gossamer ({loss})"
    return [Candidate(name, rules_of(settings, pick, solution, repeat), solution, loss) for solution in found]


def best_sinks(problem: Problem) -> tuple[Problem, np.ndarray]:
    """The problem with one rule per cost, each head with the one that loses least, and the index of that rule [heads,
    costs]. Rules of equal cost at every length differ in their sinks alone; costs are those of every head."""
    alike: dict[bytes, list[int]] = {}
    for index, cost in enumerate(problem.costs[:, 0].T):
        alike.setdefault(cost.tobytes(), []).append(index)
    weight = 1 / np.maximum(problem.losses.max(2).sum(1), 1e-300)
    total = np.tensordot(weight, problem.losses, 1)  # [heads, rules]
    least = lambda members: np.array(members)[total[:, members].argmin(1)]
    pick = np.stack([least(members) for members in alike.values()], axis=1)
    take = lambda x: np.take_along_axis(x, pick[None], axis=2)
    return Problem(take(problem.losses), take(problem.costs), problem.budgets), pick


def rules_of(settings: Settings, pick: np.ndarray, solution: Solution, repeat: int) -> Rules:
    """The rules of a solution over `best_sinks`, where each run of `repeat` heads shares one."""
    rules, facts = settings.rules, settings.facts
    chosen = [rules[pick[h, s]] for h, s in enumerate(solution.choice)]
    every = [rule for rule in chosen for _ in range(repeat)]
    return tuple(tuple(every[i * facts.kv_heads : (i + 1) * facts.kv_heads]) for i in range(facts.layers))


def _even(settings: Settings) -> Candidate:
    """The uniform plan, with as many sinks as fit beside the least that a head keeps, at most the usual number."""
    stage, facts = settings.stage, settings.facts
    room = int(stage.density * settings.budgeted[0] + 1e-9) - settings.least
    return Candidate("uniform", uniform(facts.layers, facts.kv_heads, stage.density, max(min(settings.sink, room), 0)))


def _scaled(problem: Problem) -> Problem:
    return Problem(
        problem.losses / np.maximum(problem.losses.max(2).sum(1), 1e-300)[:, None, None],
        problem.costs,
        problem.budgets,
    )


def streaming_rule(settings: Settings) -> HeadRule:
    """What a streaming head keeps where no file says so: sinks and a 32nd of the longest length (256 at 8192), not more
    than half of what the density allows at the shortest length."""
    allowed = int(settings.stage.density * settings.lengths[0]) // 2
    recent = max(min(settings.lengths[-1] // 32, allowed - settings.sink), settings.least)
    return HeadRule(settings.sink, settings.sink + recent, 0.0)


def _by_mass(settings: Settings, profiles: Mapping[int, Profile]) -> Candidate:
    """Full where most probability lies outside sinks and recent tokens: a score that needs no training."""
    streaming = streaming_rule(settings)
    scores = np.mean([profiles[n].mass[..., -1].numpy() for n in settings.lengths], axis=0)
    rules = duo(scores, settings.stage.density, settings.budgeted, settings.least, streaming, "method duo")
    return Candidate("duo (attention mass outside the window)", rules)
