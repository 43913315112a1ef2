"""What stages that prune while they train say of the masks."""

from __future__ import annotations

from pydantic import Field

from .sparsity import Scope, SparsityStage
from .training import TrainingStage


class TargetStage(SparsityStage, TrainingStage):
    """A training stage that ends at a sparsity or pattern. The head is never pruned."""

    scope: Scope | None = Field(None, description="unit of comparison of unstructured scores; default: model")

    @property
    def unit(self) -> Scope:
        """The scope that holds."""
        return self.scope or "model"

    @property
    def untie(self) -> bool:
        """Matrices of the blocks alone are pruned here, so the head stays as it is."""
        return False
