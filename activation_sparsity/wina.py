"""WINA-like: inputs weighted by the norm of the column they multiply (Chen et al. 2025).

    m_j = |x_j| * ||W[:, j]||_2 > t

The score of the paper with thresholds in place of a sort per token, in the model's own basis (the authors rotate the
weights so that columns become orthogonal, and then use norms for two of seven matrices only). Budgets as `threshold`.
"""

from __future__ import annotations

from torch import Tensor

from .method import Site
from .threshold import Threshold


class Wina(Threshold):
    """See `Threshold`."""

    name = "wina"

    def scales(self, site: Site, name: str) -> Tensor | None:
        """||W[:, j]||."""
        return site.weights[name].norm(dim=0)
