"""From a model and its texts to a head plan: profile, candidates, choice by validation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...attention.cost import decode_cost
from ...attention.minference import MInference
from ...attention.plan import HeadPlan
from ..progress import Progress
from .answers import own_answers
from .candidates import Candidate, candidates, needs_profile, streaming_rule
from .items import Item
from .prefill import search_prefill
from .probe import probe_items
from .profile import Profile, profile
from .refine import refine
from .settings import Settings
from .texts import HeadTexts
from .validate import Verdict, judge

REFINED_ON = 8  # calibration sequences of the longest length
GENERATED = 1024  # tokens of the decode whose cost is predicted, at most an eighth of the prompt


@dataclass(frozen=True)
class Made:
    """The plan, with how it came about inside; `judged`: every candidate's name, densities and verdict; `chosen`: the
    plan's index among them."""

    plan: HeadPlan
    judged: list[dict[str, Any]]
    chosen: int


def make_plan(
    model: Any, tokenizer: Any, settings: Settings, texts: HeadTexts, *, seed: int, progress: Progress, cache: Path
) -> Made:
    """Plan heads for a model in memory (eval mode, on its device); `cache` keeps the model's own answers."""
    items, validation = texts.items, texts.validation
    if settings.stage.answers == "own":
        items, validation = own_answers(model, tokenizer, items, validation, cache, progress)
    profiles = measure(model, settings, items, progress)
    started = time.monotonic()
    found = candidates(settings, profiles)
    if time.monotonic() - started >= settings.stage.time_limit:
        progress.note(
            f"the search for plans was ended by its time limit of {settings.stage.time_limit:g} s: {len(found)} were "
            "found until then, and more time may find better ones"
        )
    if settings.stage.method == "gossamer" and settings.stage.refine:
        progress.working(f"measure up to {settings.stage.refine} variants of the best plan")
        found.insert(0, refined(model, settings, profiles, found, items[settings.lengths[-1]], seed))
    probe = probe_items(tokenizer, settings.validation, settings.stage.probe, seed) if tokenizer else []
    progress.working(f"judge {len(found)} plans on held-out text")
    plans = [settings.facts.plan(c.rules, settings.least, settings.lengths) for c in found]
    verdicts = judge(model, plans, validation, probe)
    best = min(range(len(found)), key=lambda i: verdicts[i].badness)
    solution = found[best].solution
    if solution is not None and solution.status == "time limit":
        above = f"{100 * solution.gap:.2g} % above its lower bound" if solution.gap < 1 else "without a useful bound"
        progress.note(f"the solver of the chosen plan was stopped by its time limit, {above}")
    made = _made(settings, texts, found[best], verdicts[best], seed)
    judged = [
        {"name": c.name, "density": _densities(settings, p), **v.as_dict()}
        for c, p, v in zip(found, plans, verdicts, strict=True)
    ]
    if settings.stage.prefill == "minference":
        progress.working("search prefill patterns")
        made["prefill"] = search_prefill(model, settings.facts, validation[0], MInference())
    made |= {"candidates": len(found), "cost": _costs(model, settings, plans[best])}
    return Made(settings.facts.plan(found[best].rules, settings.least, settings.lengths, made), judged, best)


def refined(
    model: Any,
    settings: Settings,
    profiles: Mapping[int, Profile],
    found: Sequence[Candidate],
    items: Sequence[Item],
    seed: int,
) -> Candidate:
    """The candidate that does best on a few calibration sequences, bettered there."""
    few = items[:REFINED_ON]
    run = lambda rules: settings.facts.plan(rules, settings.least, settings.lengths)
    solved = [c for c in found if c.loss is not None and c.name.startswith("gossamer")]
    verdicts = judge(model, [run(c.rules) for c in solved], few)
    start = solved[min(range(len(solved)), key=lambda i: verdicts[i].kl)]
    return refine(settings, profiles, start, lambda rules: judge(model, [run(rules)], few)[0].kl, seed)


def measure(
    model: Any, settings: Settings, items: Mapping[int, Sequence[Any]], progress: Progress
) -> dict[int, Profile]:
    """Profiles of every length; none where the method does not look at the model."""
    if not needs_profile(settings):
        return {}
    rules = [streaming_rule(settings)] if settings.stage.method == "duo" else settings.rules
    return {
        n: profile(model, settings.facts, items[n], rules, settings.least, progress, f"influence at {n} tokens")
        for n in settings.lengths
    }


def _made(settings: Settings, texts: HeadTexts, chosen: Candidate, verdict: Verdict, seed: int) -> dict[str, Any]:
    stage = settings.stage
    return {
        "method": stage.method,
        "name": chosen.name,
        "loss": chosen.loss,
        "density_asked": stage.density,
        "solver": chosen.solver,
        "validation": {
            **verdict.as_dict(),
            "length": settings.validation,
            "sequences": len(texts.validation),
            "dataset": texts.validated.dataset,
            "digest": texts.validated.digest,
        },
        "calibration": {
            "dataset": texts.calibration.dataset,
            "text": texts.calibration.text,
            "digest": texts.calibration.digest,
            "counted": texts.answers if stage.answers == "given" else "the model's own answers",
            "sequences": {str(n): len(items) for n, items in texts.items.items()},
        },
        "seed": seed,
    }


def _densities(settings: Settings, plan: HeadPlan) -> dict[str, float]:
    return {str(n): round(plan.density(n), 6) for n in settings.budgeted}


def _costs(model: Any, settings: Settings, plan: HeadPlan) -> dict[str, dict[str, Any]]:
    """Predicted decode of every budgeted length, dense and planned."""
    facts = settings.facts
    shape = {
        "layers": facts.layers, "query_heads": facts.query_heads, "kv_heads": facts.kv_heads,
        "head_dim": facts.head_dim, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    found = {}
    for n in settings.budgeted:
        tokens = max(min(GENERATED, n // 8), 1)
        pair = {
            name: decode_cost(which, **shape, prompt=n - tokens, tokens=tokens).as_dict()
            for name, which in (("plan", plan), ("dense", None))
        }
        found[str(n)] = {**pair, "kv_bytes": plan.kv_bytes(n), "dense_kv_bytes": plan.dense_kv_bytes(n)}
    return found
