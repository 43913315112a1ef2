"""RIA: relative importance and activations, without the channel permutation (which would need a gather at run time).

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LayerStats, Log, prepare, select, silent
from .pattern import Pattern

_POWER = 0.5
_TINY = torch.finfo(torch.float32).tiny


class RIA:
    """score_ij = (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||^0.5.

    A weight counts for its share of its input column and of its output row, so no channel is emptied altogether.
    """

    name = "ria"
    needs = frozenset({"norm"})
    order = "block"
    scope = "matrix"

    def prune(self, weight: Tensor, stats: LayerStats, pattern: Pattern, log: Log = silent) -> tuple[Tensor, Tensor]:
        """See `Method.prune`."""
        dense = prepare(weight, stats, self.needs, pattern)
        assert stats.norm is not None
        size = dense.abs()
        share = size / size.sum(0, keepdim=True).clamp_min(_TINY) + size / size.sum(1, keepdim=True).clamp_min(_TINY)
        return select(dense, share * stats.norm.pow(_POWER), pattern)
