"""The method of an activation stage with its options, and what its tokens skip on the mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...activation_sparsity.base import Policy
from ...activation_sparsity.method import Method
from ...activation_sparsity.registry import get_policy_method
from ..stage_recipes.activation import RSPARSE, ActivationStage


def make_method(stage: ActivationStage, seed: int, blocks: int) -> Method:
    """The stage's method with its options, for a model of so many blocks."""
    kind: Any = get_policy_method(stage.method)
    options: dict[str, Any] = {}
    if stage.method == "coreinfer":
        options = {"mode": stage.guide or "stability", "refresh": stage.refresh, "seed": seed, "blocks": blocks}
        options |= {name: getattr(stage, name) for name in ("alpha", "keep", "drift", "layers")}
    elif stage.method == "rsparse":
        options = {"search": stage.search, "seed": seed}
        options |= {name: getattr(stage, name) for name in RSPARSE}
    elif stage.method in ("threshold", "wina"):
        options = {"uniform": not stage.search}
    elif stage.method == "auto":
        options = {"search": stage.search}
    return kind(**{name: value for name, value in options.items() if value is not None})  # type: ignore[no-any-return]


def with_watched(policy: Policy, whole: float) -> Policy:
    """`policy`, whose figures are of tokens that skip, with those of all tokens: a share `whole` skips nothing."""
    facts = dict(policy.facts)
    part = 1 - whole
    facts |= {"target": facts["target"] * part, "calibrated": facts["calibrated"] * part, "watched": whole}
    facts["matrices"] = {name: round(value * part, 5) for name, value in facts["matrices"].items()}
    return replace(policy, facts=facts)
