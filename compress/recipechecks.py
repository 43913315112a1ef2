"""What a recipe as a whole may not ask of a model: nothing that one of its stages could see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ..errors import RecipeError
from .format import METADATA_KEY
from .jobs import MatrixJob
from .recipe import STAGES, Recipe
from .source import FolderSource


class HasJobs(Protocol):
    """A planned stage, as far as it matters here."""

    @property
    def jobs(self) -> Sequence[MatrixJob]:
        """Matrices that it prunes."""
        ...


def check_attachments(recipe: Recipe, source: FolderSource) -> None:
    """RecipeError when weights change under something that was measured on them."""
    own = source.config.get(METADATA_KEY)
    changed = [stage.stage for stage in recipe.stages if stage.changes_weights]
    made = {stage.attaches for stage in recipe.stages}
    known = {kind.attaches for kind in STAGES.values() if kind.attaches}
    for name in sorted(known & set(own if isinstance(own, dict) else ())):
        if changed and name not in made:
            raise RecipeError(
                f"{source.folder} has its {name} measured on its weights, and {changed[0]} changes them",
                hint=f"add a stage that makes the {name} anew, or start from the checkpoint before it",
            )


def check_values(recipe: Recipe, source: FolderSource, stages: Iterable[HasJobs]) -> None:
    """RecipeError when values are to be rounded and no matrix has a mask."""
    if recipe.export.values == "int8" and not source.records() and not any(stage.jobs for stage in stages):
        raise RecipeError(
            "values int8 stores the kept weights of pruned matrices, and nothing here is pruned",
            hint="prune as well (--sparsity 0.5, --pattern 2:4), or leave int8 out",
        )
