"""What an activation policy skipped, as the kernels counted it."""

from __future__ import annotations

from typing import Any

from ...kernels.modules.counting import Counts
from .loaded import AppliedPolicy


def realised(model: Any, counted: Counts) -> dict[str, Any]:
    """Share of the weights of the blocks' linear maps that was not read, over the sparse steps of a `counting` block.

    `skipped`: of all maps, by their elements, those that skip nothing included; `layers`: of each map; `steps`: calls
    of the model with sparse tokens. A low-rank rest counts as read. With several rows a weight counts once, when any
    row needs it. Maps that zero their inputs instead of skipping (`fallback`) count as read.
    """
    applied: AppliedPolicy = model.gossamer_activation
    layers: dict[str, float] = {}
    every, read = 0, 0.0
    for name, (rows, cols) in applied.policy.shapes.items():
        size = rows * cols
        tally = counted.get(id(_module(model, name)))
        layers[name] = 0.0 if tally is None else tally.skipped
        every += size
        read += size * (1.0 - layers[name])
    return {"steps": counted.steps, "skipped": 1.0 - read / every if every else 0.0, "layers": layers}


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:  # an expert of a stack
        return None
