"""Magnitude pruning: the smallest |w| go.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015.
"""

from __future__ import annotations

from torch import Tensor

from .base import LayerStats, Log, prepare, select, silent
from .pattern import Pattern


class Magnitude:
    """score = |w|. Needs no statistics, and is the only method whose scores compare across matrices."""

    name = "magnitude"
    needs: frozenset[str] = frozenset()
    order = "block"
    scope = "row"

    def prune(self, weight: Tensor, stats: LayerStats, pattern: Pattern, log: Log = silent) -> tuple[Tensor, Tensor]:
        """See `Method.prune`."""
        dense = prepare(weight, stats, self.needs, pattern)
        return select(dense, dense.abs(), pattern)
