"""The offline search of a sparse prefill method over a model: one set of parameters per layer and query head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention.observe import observing
from ...attention.prefill import Parameters, PrefillMethod, measure
from .facts import HeadFacts
from .items import Item


@torch.no_grad()
def search_prefill(model: Any, facts: HeadFacts, item: Item, method: PrefillMethod) -> dict[str, Any]:
    """JSON values: `heads` [layers][query heads], and the mean recall and density on the sequence searched."""
    found: dict[int, list[Parameters]] = {}
    recall = density = 0.0

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor, scale: float) -> None:
        nonlocal recall, density
        group = q.shape[1] // k.shape[1]
        found[layer] = []
        for h in range(q.shape[1]):
            parameters = method.search(q[0, h], k[0, h // group], scale)
            seen = measure(q[0, h], k[0, h // group], method, parameters, scale)
            recall, density = recall + seen.recall, density + seen.density
            found[layer].append({name: _plain(value) for name, value in parameters.items()})

    with observing(model, observe):
        model(item.ids[None].to(next(model.parameters()).device), use_cache=False)
    heads = facts.layers * facts.query_heads
    return {
        "method": method.name,
        "length": len(item.ids),
        "recall": round(recall / heads, 6),
        "density": round(density / heads, 6),
        "heads": [found[layer] for layer in range(facts.layers)],
    }


def _plain(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
