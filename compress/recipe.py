"""What to do (Recipe) and how to do it (Machine): the single source of names and defaults.

A recipe is a list of stages. The one-line command and a YAML file build the same object, and that object is saved in
the checkpoint. Nothing changes it after validation. Import-light: pydantic and yaml only, no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import RecipeError
from ..pruning.registry import DEFAULT_METHOD
from .mistakes import Mistake, checked, explain

Scope = Literal["row", "matrix", "model"]
Allocation = Literal["uniform", "owl"]
Format = Literal["sparse", "dense", "both"]
Values = Literal["same", "int8"]

DEFAULT_SPARSITY = 0.5
DEFAULT_CALIBRATION = "c4"
DEFAULT_EVALUATION = "wikitext2"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PruneStage(_Frozen):
    """One-shot pruning, decoder block by decoder block."""

    stage: Literal["prune"] = "prune"
    method: str = DEFAULT_METHOD
    sparsity: float | None = Field(None, description="fraction of zeros; default 0.5 when no pattern is given")
    pattern: str | None = Field(None, description='"2:4" (keep 2 of every 4 inputs) or "block:4x8"')
    allocation: Allocation = "uniform"
    scope: Scope | None = Field(
        None, description="unit of comparison of unstructured scores; default: the method's own"
    )
    reconstruct: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    untie: bool = False
    calibration: str | None = None
    nsamples: int = Field(128, ge=1)
    seqlen: int | None = Field(None, ge=2)

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise Mistake(
                f"sparsity must be in [0, 1), got {value:g}",
                hint="it is the fraction of zeros: 0.5 removes half of the weights",
            )
        return value

    @field_validator("include", "exclude")
    @classmethod
    def _valid_regex(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise Mistake(
                    f"{pattern!r} is not a valid regular expression: {error}",
                    hint="put a backslash before characters that are meant as they are, such as \\( and \\[",
                ) from error
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PruneStage:
        if self.sparsity is not None and self.pattern is not None and not self.pattern.startswith("block"):
            raise Mistake(
                "give sparsity or pattern, not both (a block pattern takes a sparsity)",
                hint="N:M says it already: 2:4 is 50 %, 1:4 is 75 %",
            )
        if self.allocation == "owl" and self.pattern is not None:
            raise Mistake(
                "allocation owl needs an unstructured sparsity: a fixed pattern leaves nothing to allocate",
                hint="give a sparsity instead of the pattern, or leave the allocation out",
            )
        if self.allocation == "owl" and self.scope == "model":
            raise Mistake("allocation owl and scope model both decide the sparsity per matrix", hint="give one of them")
        return self

    @property
    def pattern_text(self) -> str:
        """The pattern as `pruning.pattern.parse_pattern` reads it: "0.5", "2:4" or "block:4x8:0.5"."""
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        if self.pattern is None:
            return repr(sparsity)
        return f"{self.pattern}:{sparsity!r}" if self.pattern.startswith("block") else self.pattern


class EvaluateStage(_Frozen):
    """Perplexity and KL to the dense model, at this point of the recipe."""

    stage: Literal["evaluate"] = "evaluate"
    data: str = DEFAULT_EVALUATION
    seqlen: int | None = Field(None, ge=2)
    windows: int | None = Field(None, ge=1)


class ExportStage(_Frozen):
    """Which checkpoint files are written, and what the kept weights of pruned matrices are rounded to."""

    stage: Literal["export"] = "export"
    format: Format = "sparse"
    values: Values = Field("same", description="int8: 8-bit integers with a scale per 128 inputs; loses precision")
    max_shard_size: str = "5GB"

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        checked(lambda: parse_bytes(value))
        return value

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that are written."""
        return ("dense", "sparse") if self.format == "both" else (self.format,)


STAGES: dict[str, type[BaseModel]] = {"prune": PruneStage, "evaluate": EvaluateStage, "export": ExportStage}
Stage = Annotated[Union[PruneStage, EvaluateStage, ExportStage], Field(discriminator="stage")]


class Recipe(_Frozen):
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
        if "prune" not in kinds:
            raise Mistake("a recipe needs at least one prune stage", hint="use `gossamer eval` to evaluate only")
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


class Machine(_Frozen):
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


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "500MB" or "1234". RecipeError for anything else or for zero."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(f"{text!r} is not a size", hint="write a number and a unit, such as 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


_MINIMAL = "a minimal recipe is `stages: [{stage: prune, sparsity: 0.5}]`"


def build(kind: type[_Frozen], **fields: Any) -> Any:
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
