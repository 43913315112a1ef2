"""MInference (arXiv 2407.02490): per head A-shape or vertical-slash, chosen offline, filled in online.

A-shape: the first s keys and the last w. Vertical-slash: the v key columns and the d diagonals that the last 64 queries
of the prompt give most probability; the first columns and the nearest diagonals are always among them. The search tries
budgets of about equal work on one long sequence and takes the one that keeps most softmax mass, as the published code
does (the paper compares outputs); unlike there, a head for which the A-shape wins is run as an A-shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .prefill import Parameters, measure

LAST = 64  # queries that stand for the whole prompt
FIRST_COLUMNS = 30  # always kept
NEAR_DIAGONALS = 100
# Published candidates at a prompt of 30,000 tokens; shorter prompts take them in proportion.
LENGTH = 30_000
CANDIDATES: tuple[Parameters, ...] = (
    {"kind": "a-shape", "sink": 100, "window": 800},
    {"kind": "vertical-slash", "vertical": 30, "slash": 800},
    {"kind": "vertical-slash", "vertical": 100, "slash": 750},
    {"kind": "vertical-slash", "vertical": 500, "slash": 700},
    {"kind": "vertical-slash", "vertical": 3500, "slash": 100},
)


@dataclass(frozen=True)
class Lines:
    """Key columns, and diagonals by their distance from the main one; both bool, [keys]."""

    columns: Tensor
    diagonals: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        positions = torch.arange(first, last, device=self.columns.device)
        distance = positions[:, None] - torch.arange(len(self.columns), device=self.columns.device)
        return self.columns | (self.diagonals[distance.clamp(0, len(self.diagonals) - 1)] & (distance >= 0))


class MInference:
    """The published method on the interface of `prefill`. `candidates`: what the search chooses among."""

    name = "minference"

    def __init__(self, candidates: tuple[Parameters, ...] = CANDIDATES, length: int = LENGTH) -> None:
        self.candidates = candidates
        self.length = length

    def search(self, query: Tensor, key: Tensor, scale: float) -> Parameters:
        """The candidate with the highest recall on this sequence (query, key [N, D]), with what it keeps and costs."""
        best: dict | None = None
        for candidate in self.candidates:
            found = measure(query, key, self, candidate, scale)
            if best is None or found.recall > best["recall"]:
                best = {**candidate, "recall": found.recall, "density": found.density}
        assert best is not None
        return best

    def select(self, query: Tensor, key: Tensor, scale: float, parameters: Parameters, offset: int) -> Lines:
        keys, device = len(key), key.device
        size = lambda name: self._scaled(int(parameters[name]), keys)
        index = torch.arange(keys, device=device)
        if parameters["kind"] == "a-shape":
            return Lines(index < size("sink"), index < size("window"))
        columns, diagonals = _lines(query[-LAST:], key, scale, offset + len(query) - len(query[-LAST:]))
        columns[: self._scaled(FIRST_COLUMNS, keys)] = torch.inf
        diagonals[: self._scaled(NEAR_DIAGONALS, keys)] = torch.inf
        return Lines(_top(columns, size("vertical")), _top(diagonals, size("slash")))

    def _scaled(self, count: int, keys: int) -> int:
        return max(min(round(count * min(keys / self.length, 1.0)), keys), 1)


def _lines(query: Tensor, key: Tensor, scale: float, first: int) -> tuple[Tensor, Tensor]:
    """Probability on every key column and every diagonal, float32 [keys] each, summed over the given queries."""
    positions = torch.arange(first, first + len(query), device=key.device)
    distance = positions[:, None] - torch.arange(len(key), device=key.device)
    logits = (query.float() @ key.float().T) * scale
    a = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
    diagonals = a.new_zeros(len(key)).index_add_(0, distance.clamp_min(0).flatten(), a.flatten())
    return a.sum(0), diagonals


def _top(scores: Tensor, count: int) -> Tensor:
    """bool [n]: the `count` largest; of equals the first."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return chosen
