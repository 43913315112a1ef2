"""Core neurons of a sequence, after CoreInfer (Wang et al. 2024), section 3; chosen from its prompt, then fixed.

Stability: of every prompt token the neurons with the largest importance |h_i| ||W_down[:, i]|| vote, an alpha share of
those that are not zero; the core is made of the neurons with most votes, ties decided by summed importance, then by the
lower index. Similarity: the same vote at one layer gives a signature, the nearest cluster of sentences gives the core
of every layer. h is the input of down, so that gated and plain MLPs are treated alike.

Sequences do not see each other: a state holds one set per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import CoreGuide, CoreNeurons


def vote(inner: Tensor, norms: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(votes int64 [neurons], summed relative importance float32 [neurons]) of tokens inner [tokens, neurons].

    A token votes with max(1, floor(alpha * entries that are not zero)) neurons; ties to the lower index.
    """
    score = inner.float().abs() * norms
    counts = (alpha * (score > 0).sum(1)).long().clamp_min(1)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, rank < counts[:, None])
    chosen &= score > 0
    relative = score / score.sum(1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
    return chosen.sum(0), relative.sum(0)


def top(votes: Tensor, importance: Tensor, keep: int) -> Tensor:
    """int32 [keep], rising: the neurons with most votes, then largest importance, then lowest index."""
    by_importance = importance.argsort(descending=True, stable=True)
    order = by_importance[votes[by_importance].argsort(descending=True, stable=True)]
    return order[:keep].sort().values.to(torch.int32)


def stable_core(inner: Tensor, policy: CoreNeurons, alpha: float) -> Tensor:
    """int32 [keep], rising, from the prompt's inner [tokens, neurons] (without the sequence's first token)."""
    return top(*vote(inner, policy.norms, alpha), policy.keep)


def nearest_cluster(inner: Tensor, policy: CoreNeurons, guide: CoreGuide) -> int:
    """The cluster whose centroid is nearest to the signature of the prompt; `policy`: of the signature's MLP."""
    assert guide.centroids is not None
    signature = torch.zeros(policy.parts.neurons, device=inner.device)
    signature[top(*vote(inner, policy.norms, guide.alpha), guide.size).long()] = 1.0
    return int((guide.centroids - signature).square().sum(1).argmin())


def jaccard(one: Tensor, other: Tensor) -> float:
    """|A and B| / |A or B| of two sets of neurons; 1 for two empty ones."""
    both = int(torch.isin(one, other).sum())
    either = one.numel() + other.numel() - both
    return both / either if either else 1.0


def refreshed(core: Tensor, recent: Tensor, policy: CoreNeurons, guide: CoreGuide) -> Tensor:
    """The core after a look at the inner activations `recent` [tokens, neurons] of the last decode tokens, all neurons.

    Unchanged unless the tokens' own core has drifted further away than `guide.drift`.
    """
    own = stable_core(recent, policy, guide.alpha)
    return own if jaccard(core, own) < guide.drift else core
