"""The core neurons of the sequences of one batch: voted for by their prompts, and looked at again when they drift.

Every sequence has its own set, made of its own tokens alone: padding and the first token do not vote, and no token
after the prompt does, unless the policy asks for a refresh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import CoreNeurons, Policy
from .cores import refreshed, top, vote


class Sequences:
    """State of one batch of sequences; what `kernels/modules/step.py` calls Neurons.

    Usage, for each pass over prompt tokens: `begin`, then `observe` by every MLP, then `end`. In between, `chosen`.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        assert policy.guide is not None
        self.guide = policy.guide
        self.entries = {name: mlp for name, mlp in policy.mlps.items() if isinstance(mlp, CoreNeurons)}
        self.batch = batch
        self.decoded = 0
        self._votes: dict[str, list[tuple[Tensor, Tensor] | None]] = {}
        self._sets: dict[str, list[Tensor | None]] = {}
        self._recent: dict[str, list[Tensor]] = {}
        self._voters: list[Tensor] | None = None
        self._begun = [False] * batch

    def begin(self, tokens: int, valid: Tensor | None) -> None:
        """A pass over `tokens` prompt tokens per sequence; valid [batch, tokens]: those that are no padding."""
        every = torch.ones(self.batch, tokens, dtype=torch.bool) if valid is None else valid.bool().cpu()
        self._voters = []
        for index, row in enumerate(every):
            here = row.nonzero().squeeze(1)
            if not self._begun[index] and len(here):
                self._begun[index] = True
                here = here[1:]  # a sequence's first token is like no other
            self._voters.append(here)

    def observe(self, mlp: str, inner: Tensor) -> None:
        """inner [batch, tokens, neurons]: the input of down with all neurons, of prompt tokens or of a watched step."""
        entry = self.entries.get(mlp)
        if inner.dim() == 2 and inner.shape[0] % self.batch == 0:  # OPT lays its sequences end to end
            inner = inner.view(self.batch, -1, inner.shape[1])
        if entry is None or inner.dim() != 3 or inner.shape[0] != self.batch:
            return
        if self._voters is None:
            self._recent.setdefault(mlp, []).append(inner)
            return
        if self.guide.mode == "similarity" and mlp != self.guide.signature:
            return
        norms = entry.norms.to(inner.device)
        held = self._votes.setdefault(mlp, [None] * self.batch)
        for index, voters in enumerate(self._voters):
            if not len(voters):
                continue
            found = vote(inner[index, voters.to(inner.device)], norms, self.guide.alpha)
            before = held[index]
            held[index] = found if before is None else (before[0] + found[0], before[1] + found[1])

    def end(self) -> None:
        """The pass is over: sets from all votes so far. A sequence without a voter keeps all neurons."""
        self._voters = None
        if self.guide.mode == "stability":
            for name, votes in self._votes.items():
                entry = self.entries[name]
                self._sets[name] = [None if one is None else top(*one, entry.keep) for one in votes]
            return
        clusters = [self._cluster(one) for one in self._votes.get(self.guide.signature or "", [None] * self.batch)]
        for name, entry in self.entries.items():
            assert entry.clusters is not None
            self._sets[name] = [None if one is None else entry.clusters[one[0]].to(one[1]) for one in clusters]

    def _cluster(self, votes: tuple[Tensor, Tensor] | None) -> tuple[int, torch.device] | None:
        if votes is None:
            return None
        assert self.guide.centroids is not None
        place = votes[0].device
        signature = torch.zeros(len(votes[0]), device=place)
        signature[top(*votes, self.guide.size).long()] = 1.0
        return int((self.guide.centroids.to(place) - signature).square().sum(1).argmin()), place

    def chosen(self, mlp: str, batch: int) -> list[Tensor | None] | None:
        """int32 [keep], rising, for each row of a batch; None for all neurons. None where nothing is known of them.

        A batch of k times as many rows is one of k rows per sequence, in order: several tokens, or several beams.
        """
        found = self._sets.get(mlp)
        if found is None or not batch or batch % len(found):
            return None
        return [one for one in found for _ in range(batch // len(found))]

    def step(self) -> bool:
        """Count a decode step; True when it is one of those that are watched, the last quarter before a refresh."""
        self.decoded += 1
        every = self.guide.refresh
        return every > 0 and (self.decoded - 1) % every >= every - max(1, every // 4)

    def stepped(self) -> None:
        """The decode step is over; at the end of a period, sets that have drifted are taken anew."""
        if not self.guide.refresh or self.decoded % self.guide.refresh or not self._recent:
            return
        for name, parts in self._recent.items():
            recent, old = torch.cat(parts, dim=1), self._sets.get(name)
            if old is not None:
                policy = self.entries[name]
                self._sets[name] = [
                    None if core is None else refreshed(core, recent[index], _there(policy, recent), self.guide)
                    for index, core in enumerate(old)
                ]
        self._recent = {}


def _there(entry: CoreNeurons, like: Tensor) -> CoreNeurons:
    return CoreNeurons(entry.parts, entry.keep, entry.norms.to(like.device), entry.clusters)
