"""Candidate plans of every method, from a model's profiles and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...attention.plan import HeadRule
from ...attention.programs import Array
from ...attention.rivals import Rules, duo, masformer, uniform
from ...attention.solver import Problem, Solution, pareto, solve
from ...errors import RecipeError
from .profile import Profile
from .settings import Settings

Spans = tuple[Array, Array, np.ndarray]


@dataclass(frozen=True)
class Candidate:
    """Rules, what made them, and what the solver said of them."""

    name: str
    rules: Rules
    solution: Solution | None = None

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
    """At least one plan within the budget, the most promising first. RecipeError when none is."""
    method, facts = settings.stage.method, settings.facts
    if settings.imported is not None:
        return [Candidate(method, settings.imported)]
    even = Candidate("uniform", uniform(facts.layers, facts.kv_heads, settings.stage.density, settings.sink))
    if method == "uniform":
        return [even]
    if method == "duo":
        return [_by_mass(settings, profiles)]
    problem = problem_of(settings, profiles)
    problem.check_reachable(settings.budgeted)
    if method == "masformer":
        tied = _scaled(problem.tied(facts.kv_heads))
        return [Candidate(method, masformer(tied, settings.rules, facts.kv_heads))]
    repeat = facts.kv_heads if method == "per-layer" else 1
    searched = _search(settings, problem, repeat)
    if method == "per-layer":
        return searched
    # A plan that the influence does not lead to may still be the better one: validation decides.
    return [*searched, *_search(settings, problem, facts.kv_heads, only_one=True), even]


def problem_of(settings: Settings, profiles: Mapping[int, Profile]) -> Problem:
    """Losses [lengths, heads, rules] by the stage's choice, costs and budgets at every budgeted length."""
    rules, heads = settings.rules, settings.facts.heads
    losses = np.stack([getattr(profiles[n], settings.stage.loss).numpy().reshape(heads, -1) for n in settings.lengths])
    kept = np.array([[rule.kept(n, settings.least) for rule in rules] for n in settings.budgeted], dtype=np.float64)
    costs = np.repeat(kept[:, None], heads, axis=1)
    return Problem(losses, costs, settings.stage.density * np.array(settings.budgeted, dtype=np.float64) * heads)


def _search(settings: Settings, problem: Problem, repeat: int, *, only_one: bool = False) -> list[Candidate]:
    """Pareto plans where each run of `repeat` heads shares a rule, or the one with the least normalised sum."""
    problem = problem.tied(repeat) if repeat > 1 else problem
    small, pick = best_sinks(problem, settings.rules)
    full, limit = settings.stage.solver == "full", settings.stage.time_limit
    if only_one:
        single = solve(small, 1 / np.maximum(small.losses.max(2).sum(1), 1e-300), full=full, time_limit=limit)
        found = [single] if single is not None else []
    else:
        found = pareto(small, full=full, time_limit=limit)[: settings.stage.candidates]
    if not found:
        raise RecipeError(
            f"no plan reaches density {settings.stage.density:g} at every length",
            hint="ask for a larger density, or name fewer lengths",
        )
    name = "per-layer" if repeat > 1 else f"gossamer ({settings.stage.loss})"
    return [Candidate(name, _rules(settings, pick, solution, repeat), solution) for solution in found]


def best_sinks(problem: Problem, rules: Sequence[HeadRule]) -> tuple[Problem, np.ndarray]:
    """The problem with one rule per span, each head with the number of sinks that loses least, and the index of that
    rule [heads, spans]. Sinks lie inside the span, so that they hardly matter to the budget."""
    spans: dict[tuple[int, int], list[int]] = {}
    for index, rule in enumerate(rules):
        spans.setdefault((rule.alpha, rule.slope), []).append(index)
    weight = 1 / np.maximum(problem.losses.max(2).sum(1), 1e-300)
    total = np.tensordot(weight, problem.losses, 1)  # [heads, rules]
    share = (problem.costs / problem.budgets[:, None, None]).max(0)
    pick = np.stack([_least(total, share, np.array(members)) for members in spans.values()], axis=1)
    take = lambda x: np.take_along_axis(x, pick[None], axis=2)
    return Problem(take(problem.losses), take(problem.costs), problem.budgets), pick


def _least(total: Array, share: Array, members: np.ndarray) -> np.ndarray:
    """Of these rules, each head's with the least loss, and of equals the cheapest: [heads]."""
    order = np.lexsort((share[:, members], total[:, members]), axis=1)
    return members[order[:, 0]]


def _rules(settings: Settings, pick: np.ndarray, solution: Solution, repeat: int) -> Rules:
    rules, facts = settings.rules, settings.facts
    chosen = [rules[pick[h, s]] for h, s in enumerate(solution.choice)]
    every = [rule for rule in chosen for _ in range(repeat)]
    return tuple(tuple(every[i * facts.kv_heads : (i + 1) * facts.kv_heads]) for i in range(facts.layers))


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
