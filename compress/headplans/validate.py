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


class Validator:
    """Judges plans against the dense model, whose outputs are computed once.

    `items`, `probe`: sequences; the dense log probabilities of counted tokens are kept in the model's dtype on the CPU.
    """

    def __init__(self, model: Any, items: Sequence[Item], probe: Sequence[Item]) -> None:
        self._model = model
        self._items, self._probe = items, probe
        self._dense = [self._scores(item, None) for item in items]
        self._dense_probe = self._answers(None) if probe else None

    @property
    def dense_loss(self) -> float:
        """Mean cross-entropy of the dense model per counted token."""
        scores = [
            self._dense[i].float().gather(1, item.ids[item.counted].unsqueeze(1)) for i, item in enumerate(self._items)
        ]
        return -float(torch.cat(scores).mean())

    def __call__(self, plan: HeadPlan) -> Verdict:
        """Forward passes only; the order of sequences never matters."""
        kl = loss = dense = 0.0
        tokens = 0
        for item, reference in zip(self._items, self._dense, strict=True):
            found = self._scores(item, plan)
            targets = item.ids[item.counted].unsqueeze(1)
            tokens += len(targets)
            p = reference.float()
            kl += float(torch.nn.functional.kl_div(found.float(), p, log_target=True, reduction="sum"))
            loss -= float(found.float().gather(1, targets).sum())
            dense -= float(p.gather(1, targets).sum())
        probe = self._answers(plan) if self._probe else None
        return Verdict(kl / tokens, loss / tokens, dense / tokens, probe, self._dense_probe)

    @torch.no_grad()
    def _scores(self, item: Item, plan: HeadPlan | None) -> Tensor:
        """Log probabilities [counted, vocabulary] of one sequence, on the CPU."""
        device = next(self._model.parameters()).device
        with nullcontext() if plan is None else applied(self._model, plan):
            logits = self._model(item.ids[None].to(device), use_cache=False).logits[0]
        return logits[:-1][item.counted[1:].to(device)].float().log_softmax(-1).to("cpu", logits.dtype)

    def _answers(self, plan: HeadPlan | None) -> Answers:
        loss, tokens, right = 0.0, 0, 0
        for item in self._probe:
            scores, targets = self._scores(item, plan).float(), item.ids[item.counted]
            loss -= float(scores.gather(1, targets.unsqueeze(1)).sum())
            tokens += len(targets)
            right += bool((scores.argmax(1) == targets).all())
        return Answers(loss / tokens, right / len(self._probe))
