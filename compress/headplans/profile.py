"""Influence of every rule on every KV head of a model, averaged over calibration sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.influence import Influence, influence
from ...attention.observe import observing
from ...attention.plan import HeadRule
from ...errors import ModelError
from ..progress import Progress
from ..timing import Clock
from .facts import HeadFacts
from .items import Item


@dataclass(frozen=True)
class Profile:
    """float64 [layers, KV heads, rules]: means over the sequences; `mass`: mean probability removed per row."""

    group: Tensor
    fisher: Tensor
    moa: Tensor
    mass: Tensor


def profile(
    model: Any,
    facts: HeadFacts,
    items: Sequence[Item],
    rules: Sequence[HeadRule],
    block: int,
    progress: Progress,
    label: str,
) -> Profile:
    """One forward and one backward pass per sequence; each layer is scored as its gradient arrives and then let go.

    The loss is the mean cross-entropy over the counted tokens. ModelError when it is not finite, or for a layer without
    attention.
    """
    totals: dict[int, Influence] = {}

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor, scale: float) -> None:
        def arrived(gradient: Tensor) -> None:
            if k.shape[1] != facts.kv_heads or q.shape[1] != facts.query_heads:
                raise ModelError(f"layer {layer} has {k.shape[1]} KV heads, the config states {facts.kv_heads}")
            seen = lambda first, last: mask[0, 0, first:last]
            parts = (q.detach()[0], k.detach()[0], v.detach()[0], gradient[0])
            found = influence(*parts, rules, block, scale=scale, seen=seen)
            totals[layer] = totals[layer].plus(found) if layer in totals else found

        out.register_hook(arrived)

    device = next(model.parameters()).device
    embeddings = model.get_input_embeddings()
    leaf = embeddings.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    clock = Clock(len(items))
    try:
        model.requires_grad_(False)
        with observing(model, observe), torch.enable_grad():
            for done, item in enumerate(items, 1):
                loss = mean_loss(model(item.ids[None].to(device), use_cache=False).logits[0], item)
                if not bool(torch.isfinite(loss)):
                    raise ModelError("the model's loss is not finite", hint="try --dtype float32")
                loss.backward()
                progress.windows(label, done, len(items), clock.tick()[1], "sequences")
    finally:
        leaf.remove()
    if totals.keys() != set(range(facts.layers)):
        raise ModelError(
            f"attention was seen in {len(totals)} of {facts.layers} layers, so no head plan can be made",
            hint="every layer must compute its attention through transformers' attention functions",
        )
    layers = [totals[i] for i in range(facts.layers)]
    stack = lambda name: torch.stack([getattr(layer, name) for layer in layers]).cpu() / len(items)
    mass = torch.stack([layer.mass / layer.rows for layer in layers]).cpu()
    return Profile(stack("group"), stack("fisher"), stack("moa"), mass)


def mean_loss(logits: Tensor, item: Item) -> Tensor:
    """Mean cross-entropy, in float32, over the counted tokens of a sequence; logits [n, vocabulary]."""
    counted = item.counted[1:].to(logits.device)
    targets = item.ids[1:].to(logits.device)[counted]
    return torch.nn.functional.cross_entropy(logits[:-1][counted].float(), targets)
