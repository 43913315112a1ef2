"""Wanda: the smallest |w| * input norm go, compared within each output row.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024.
"""

from __future__ import annotations

from torch import Tensor

from .base import LayerStats, Log, prepare, select, silent
from .pattern import Pattern


class Wanda:
    """score_ij = |w_ij| * ||x_j||: how far output i moves, in the mean square, when weight ij alone is removed."""

    name = "wanda"
    needs = frozenset({"norm"})
    order = "block"
    scope = "row"

    def prune(self, weight: Tensor, stats: LayerStats, pattern: Pattern, log: Log = silent) -> tuple[Tensor, Tensor]:
        """See `Method.prune`."""
        dense = prepare(weight, stats, self.needs, pattern)
        assert stats.norm is not None
        return select(dense, dense.abs() * stats.norm, pattern)
