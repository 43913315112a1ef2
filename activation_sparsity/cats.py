"""CATS: neurons whose activated gate is small are not computed (Lee et al. 2024). Gated MLPs only.

    neuron i counts where |act(W_gate x)_i| > t        one t per MLP

The gate is computed whole; up's rows and down's columns of the other neurons are skipped, so at most (up + down) / all
can be skipped. The target is reached by the same share of neurons in every block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import ModelError
from .base import GateThreshold
from .method import BlockData, Extent, Fitted, Method
from .quantiles import Quantiles
from .reference import ACT


class Cats(Method):
    """See the module."""

    name = "cats"
    needs = frozenset({"gates"})

    def reachable(self, extent: Extent) -> float:
        """See `Method.reachable`."""
        return extent.others / extent.whole if extent.gates else 1.0  # without gates `fit` says what is missing

    def fit(self, block: BlockData, budgets: Mapping[str, float], target: float, extent: Extent) -> Fitted:
        """See `Method.fit`. ModelError for a model without gated MLPs."""
        if not extent.gates:
            raise ModelError(
                "cats needs MLPs with a gate, act(gate x) * up x, and this model has none",
                hint="use --activation auto or coreinfer, which take any MLP",
            )
        share = target * extent.whole / extent.others
        mlps = {}
        for path, parts in block.mlps.items():
            if path in block.gates and share > 0:
                value = Quantiles(ACT[parts.activation](block.gates[path]).abs()).at(share)
                mlps[path] = GateThreshold(parts, torch.full((parts.neurons,), value))
        return Fitted(mlps=mlps)
