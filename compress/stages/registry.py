"""The table of stages: what each kind of stage of a recipe does. Import-free: planning loads only what it needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..needs import Needs
    from ..plan import Plan, Planning, StagePlan
    from .base import Context, StageReport

_TABLE = {
    "activation": "activation:Activation",
    "prune": "prune_kind:Prune",
    "heads": "heads:Heads",
    "evaluate": "evaluate:Evaluate",
    "finetune": "finetune:Finetune",
    "merge": "merge:Merge",
    "imp": "imp:Imp",
    "soup": "soup:SoupKind",
    "gradual": "gradual:Gradual",
    "random": "random_search:RandomSearch",
    "nm-flow": "nm_flow:NmFlow",
}

# What `compress --method` names beside the one-shot methods, with a line for people.
TRAINED = {
    "imp": "iterative magnitude pruning: prune a part of the rest, retrain, several times (Han et al. 2015)",
    "soup": "sparse model soups: imp, whose phases average several candidates under one mask (Zimmer et al. 2024)",
    "gradual": "the mask tightens along a cubic curve while the model trains (Zhu and Gupta 2017)",
    "random": "a baseline: the best of several random sparse subnetworks at the same budget",
    "nm-flow": "trains towards an N:M pattern that is approached step by step (Bambhaniya et al. 2025)",
}


class StageKind(Protocol):
    """One kind of stage."""

    def plan(self, index: int, stage: Any, planning: Planning) -> StagePlan:
        """What the stage will do. Every mistake of the user's is found here, before a weight is read."""
        ...

    def needs(self, plan: Plan, stage: Any) -> Needs:
        """Memory and disk, from shapes alone."""
        ...

    def run(self, context: Context, stage: Any) -> StageReport:
        """Do it. A stage that changes weights leaves part files in `context.part_folder(stage)` and may be called again
        after a kill: what it finds there and in the journal is finished."""
        ...


def stage_kind(name: str) -> StageKind:
    """The stage called `name` in recipes."""
    module, _, kind = _TABLE[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), kind)()
