"""Candidate plans on held-out sequences: divergence from the dense model, its loss, and the retrieval probe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.plan import HeadPlan
from ..heads import applied
from .items import Item

ROWS = 512  # whose probabilities exist at once
RELIABLE = 0.5  # accuracy of the dense model from which on the probe counts


@dataclass(frozen=True)
class Answers:
    """What one model says on the probe: mean loss per answer token in nats, share of answers right."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Verdict:
    """One plan: `kl`: mean KL(dense || plan) per counted token; losses are mean cross-entropies of counted tokens."""

    kl: float
    loss: float
    dense_loss: float
    probe: Answers | None
    dense_probe: Answers | None

    @property
    def probe_counts(self) -> bool:
        return self.dense_probe is not None and self.dense_probe.accuracy >= RELIABLE

    @property
    def badness(self) -> float:
        """KL, and what the probe's answers lose where the dense model knows them."""
        if not self.probe_counts:
            return self.kl
        assert self.probe is not None
        assert self.dense_probe is not None
        return self.kl + max(self.probe.loss - self.dense_probe.loss, 0.0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "probe_counts": self.probe_counts}


def judge(model: Any, plans: Sequence[HeadPlan], items: Sequence[Item], probe: Sequence[Item] = ()) -> list[Verdict]:
    """A verdict on every plan; forward passes only. One sequence's scores are held at a time, for two models."""
    sums = [_Sums() for _ in plans]
    dense, tokens = 0.0, 0
    for item in items:
        reference, targets = _logits(model, item, None), item.ids[item.counted]
        tokens += len(targets)
        dense += _loss(reference, targets)
        for plan, total in zip(plans, sums, strict=True):
            found = _logits(model, item, plan)
            total.kl += _kl(reference, found)
            total.loss += _loss(found, targets)
    known = answers(model, None, probe) if probe else None
    said = [answers(model, plan, probe) if probe else None for plan in plans]
    return [
        Verdict(total.kl / tokens, total.loss / tokens, dense / tokens, own, known)
        for total, own in zip(sums, said, strict=True)
    ]


def answers(model: Any, plan: HeadPlan | None, probe: Sequence[Item]) -> Answers:
    """What the model says on the probe under a plan; None is the dense model."""
    loss, tokens, right = 0.0, 0, 0
    for item in probe:
        logits, targets = _logits(model, item, plan), item.ids[item.counted]
        loss += _loss(logits, targets)
        tokens += len(targets)
        right += bool((logits.argmax(1).cpu() == targets).all())
    return Answers(loss / tokens, right / len(probe))


@dataclass
class _Sums:
    kl: float = 0.0
    loss: float = 0.0


@torch.no_grad()
def _logits(model: Any, item: Item, plan: HeadPlan | None) -> Tensor:
    """Logits [counted, vocabulary] of one sequence, in the model's dtype and on its device."""
    device = next(model.parameters()).device
    with nullcontext() if plan is None else applied(model, plan):
        logits = model(item.ids[None].to(device), use_cache=False).logits[0]
    return logits[:-1][item.counted[1:].to(device)]


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Summed cross-entropy."""
    parts = zip(logits.split(ROWS), targets.to(logits.device).split(ROWS), strict=True)
    return sum(float(torch.nn.functional.cross_entropy(x.float(), y, reduction="sum")) for x, y in parts)


def _kl(reference: Tensor, logits: Tensor) -> float:
    """Summed KL(reference || logits)."""
    parts = zip(reference.split(ROWS), logits.split(ROWS), strict=True)
    logs = ((p.float().log_softmax(-1), q.float().log_softmax(-1)) for p, q in parts)
    return sum(float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")) for p, q in logs)
