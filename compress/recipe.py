"""What to do (Recipe) and how to do it (Machine): the single source of names and defaults.

A recipe is a list of stages (`stage_recipes/`). The one-line command and a YAML file build the same object, and that
object is saved in the checkpoint. Nothing changes it after validation. Import-light: pydantic and yaml only, no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ..errors import RecipeError
from .mistakes import Mistake, checked, explain
from .sizes import parse_bytes
from .stage_recipes.activation import ActivationStage
from .stage_recipes.base import BaseStage, Frozen
from .stage_recipes.evaluate import EvaluateStage
from .stage_recipes.export import ExportStage
from .stage_recipes.finetune import FinetuneStage
from .stage_recipes.gradual import GradualStage, RandomStage
from .stage_recipes.heads import HeadsStage
from .stage_recipes.imp import ImpStage, SoupStage
from .stage_recipes.merge import MergeStage
from .stage_recipes.nm_flow import NmFlowStage
from .stage_recipes.prune import PruneStage

__all__ = [
    "STAGES",
    "ActivationStage",
    "EvaluateStage",
    "ExportStage",
    "FinetuneStage",
    "GradualStage",
    "HeadsStage",
    "ImpStage",
    "Machine",
    "MergeStage",
    "NmFlowStage",
    "PruneStage",
    "RandomStage",
    "Recipe",
    "SoupStage",
    "build",
    "load_recipe",
]

DEFAULT_CALIBRATION = "c4"

# A new kind of stage: its class here, and its work in stages/registry.py.
_Kinds = Union[
    PruneStage,
    ImpStage,
    SoupStage,
    GradualStage,
    RandomStage,
    NmFlowStage,
    FinetuneStage,
    MergeStage,
    ActivationStage,
    HeadsStage,
    EvaluateStage,
    ExportStage,
]
Stage = Annotated[_Kinds, Field(discriminator="stage")]
STAGES: dict[str, type[BaseStage]] = {kind.model_fields["stage"].default: kind for kind in get_args(_Kinds)}


class Recipe(Frozen):
    """An ordered list of stages. An export stage, if any, comes last; without one the sparse format is written."""

    stages: tuple[Stage, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**63)
    allow_overlap: bool = False

    @model_validator(mode="after")
    def _order(self) -> Recipe:
        kinds = [stage.stage for stage in self.stages]
        if kinds.count("export") > 1 or ("export" in kinds and kinds[-1] != "export"):
            raise Mistake(
                f"one export stage, at the end, is allowed; the stages are {', '.join(kinds)}",
                hint="move it to the end; `format: both` writes both forms",
            )
        if not any(stage.changes_weights or stage.attaches for stage in self.stages):
            raise Mistake(
                "a recipe needs at least one stage that changes the model",
                hint="add a prune stage, or use `gossamer eval` to evaluate only",
            )
        attached = [stage.attaches for stage in self.stages if stage.attaches]
        for name in attached:
            if attached.count(name) > 1:
                raise Mistake(f"two stages make the {name} of the checkpoint", hint="give one of them")
        return self

    @property
    def export(self) -> ExportStage:
        """The export stage, or the default one."""
        last = self.stages[-1]
        return last if isinstance(last, ExportStage) else ExportStage()

    def sha256(self) -> str:
        """Digest of the canonical JSON of the recipe."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML, without fields that hold their default."""
        document: dict[str, Any] = {"seed": self.seed}
        if self.allow_overlap:
            document["allow_overlap"] = True
        document["stages"] = [
            {"stage": stage.stage, **stage.model_dump(mode="json", exclude_defaults=True)} for stage in self.stages
        ]
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


class Machine(Frozen):
    """How to run: nothing here changes what is computed, except through rounding (dtype, device, threads)."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_memory: str = "8GiB"

    @field_validator("max_memory")
    @classmethod
    def _size(cls, value: str) -> str:
        checked(lambda: parse_bytes(value))
        return value

    @property
    def max_memory_bytes(self) -> int:
        return parse_bytes(self.max_memory)


_MINIMAL = "a minimal recipe is `stages: [{stage: prune, sparsity: 0.5}]`"


def build(kind: type[Frozen], **fields: Any) -> Any:
    """An instance of a recipe class; RecipeError (one line per mistake) instead of pydantic's ValidationError."""
    try:
        return kind(**fields)
    except ValidationError as error:
        message, hint = explain(error, kind, STAGES)
        raise RecipeError(message, hint=hint) from None


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe. RecipeError for a missing file, bad YAML, or any field that does not fit."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}", hint="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe {path} is not valid YAML: {reason}", hint=_MINIMAL) from error
    if not isinstance(document, dict) or "stages" not in document:
        raise RecipeError(
            f"recipe {path} has no list of stages",
            hint=_MINIMAL,
        )
    try:
        return build(Recipe, **{str(name): value for name, value in document.items()})
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error.message}", hint=error.hint) from error
