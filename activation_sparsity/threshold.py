"""TEAL: an input below its matrix's magnitude threshold counts as zero (Liu et al. 2024).

    m_j = |x_j| > t        one t per matrix, from the distribution of its inputs in the dense model

Budgets of a block's matrices by greedy search (`greedy.py`), every block with the same target. Beside the authors'
code: thresholds are quantiles of |x|, not of a histogram that is taken to be symmetric; matrices have their true sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .base import LinearPolicy
from .greedy import STEP, greedy
from .method import BlockData, Extent, Fitted, Method, Site
from .quantiles import Quantiles
from .refine import balanced


class Threshold(Method):
    """`uniform`: every matrix the same sparsity, no search. `step`: of the search."""

    name = "threshold"

    def __init__(self, *, uniform: bool = False, step: float = STEP) -> None:
        self.uniform, self.step = uniform, step
        self._found: dict[int, dict[str, float]] = {}  # by block; a corrected goal moves all of them
        self.needs = frozenset({"inputs"}) if uniform else frozenset({"inputs", "error"})

    def scales(self, site: Site, name: str) -> Tensor | None:
        """float32 [in] that |x| is multiplied with before it is compared; None = ones."""
        return None

    def fit(self, block: BlockData, budgets: Mapping[str, float], target: float, extent: Extent) -> Fitted:
        """See `Method.fit`."""
        goal = min(1.0, target * extent.whole / extent.sites)
        scales = {name: self.scales(site, name) for site in block.sites for name in site.weights}
        tables = {name: Quantiles(_scores(site.x, scales[name])) for site in block.sites for name in site.weights}
        sizes = {name: weight.numel() for site in block.sites for name, weight in site.weights.items()}
        widths = {name: site.width for site in block.sites for name in site.weights}

        def entries(shares: Mapping[str, float]) -> dict[str, LinearPolicy]:
            return {
                name: LinearPolicy(_threshold(tables[name].at(share), widths[name], scales[name]))
                for name, share in shares.items()
                if share > 0
            }

        shares = dict.fromkeys(sizes, goal)
        if not self.uniform and 0 < goal < 1:
            known = self._found.get(block.index) or self._search(block, sizes, goal, entries)
            shares = balanced(known, sizes, goal * sum(sizes.values()))
            self._found.setdefault(block.index, shares)
        return Fitted(entries(shares), facts={"budgets": shares})

    def restored(self, index: int, fitted: Fitted) -> None:
        """See `Method.restored`."""
        if not self.uniform and any(0 < share < 1 for share in fitted.facts["budgets"].values()):
            self._found.setdefault(index, dict(fitted.facts["budgets"]))

    def _search(
        self,
        block: BlockData,
        sizes: Mapping[str, int],
        goal: float,
        entries: Callable[[Mapping[str, float]], dict[str, LinearPolicy]],
    ) -> dict[str, float]:
        assert block.error is not None
        error = block.error
        return greedy(sizes, goal, lambda trial: error(entries(trial), {}), self.step)


def _scores(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.abs() if scale is None else x.abs() * scale


def _threshold(value: float, width: int, scale: Tensor | None) -> Tensor:
    """|x_j| * scale_j <= value as a test of |x_j| alone; a channel with scale 0 never counts, but for value < 0."""
    if scale is None or value < 0:
        return torch.full((width,), value, dtype=torch.float32)
    return torch.where(scale > 0, value / scale.clamp_min(torch.finfo(torch.float32).tiny), torch.inf)
