"""A cache that holds what each KV head keeps and nothing else, for models of transformers as they are.

Layers and what a model gets from them: raggedlayer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .layout import Layout
from .plan import HeadPlan
from .raggedlayer import RaggedLayer
from .shared import Shared


class RaggedCache(Cache):
    """A cache for a head plan. `reserve`: tokens that there shall be room for from the begin.

    `prefill`: "blocks" (chunk.py: products with the keys that a block of queries sees) or "flex" (flex_attention).
    """

    layers: list[RaggedLayer]  # type: ignore[assignment]

    def __init__(self, plan: HeadPlan, reserve: int = 0, prefill: str = "blocks") -> None:
        self.shared = Shared(plan, reserve, prefill)
        super().__init__(layers=[RaggedLayer(self.shared, index) for index in range(plan.layers)])

    @property
    def plan(self) -> HeadPlan:
        return self.shared.plan

    def reset(self) -> None:
        super().reset()
        self.shared.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        stores = [layer.store for layer in self.layers if layer.store is not None]
        sequences = len(stores[0].counts) if stores else 0
        sequences = sequences or max(
            (layer.keys.shape[0] for layer in self.layers if layer.keys is not None), default=0
        )
        self.batch_select_indices(torch.arange(sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences `indices`, each any number of times."""
        indices = indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices
        layouts: dict[int, Layout] = {}
        for layer in self.layers:
            present = layer.store.layout if layer.store is not None else None
            if present is not None and id(present) not in layouts:
                layouts[id(present)] = present.select(indices)
            layer.select(indices, layouts.get(id(present)))
        self.shared.forget()
