"""The plan: from recipe, config.json and safetensors headers to a list of jobs, before a weight is read.

Everything the user could have wrong is looked for here, and all mistakes are reported together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import DataError, GossamerError, RecipeError
from .blocks import StreamedModel
from .evaluate import Protocol
from .jobs import MatrixJob
from .journal import begun
from .recipe import Machine, Recipe
from .recipechecks import check_attachments, check_values
from .shrinking import check_targets
from .source import FolderSource
from .stage_recipes.base import BaseStage
from .stage_recipes.evaluate import EvaluateStage
from .stage_recipes.prune import PruneStage
from .stages.registry import stage_kind
from .text import Texts, TextSource

if TYPE_CHECKING:
    from .estimate import Estimate

DEFAULT_SEQLEN = 2048
SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class StagePlan:
    """What one stage will do. `index`: its place in the recipe. `jobs`: matrices that get a mask, or a smaller one.

    `skipped`: (matrix, reason) left out. `windows`: tokens [nsamples, seqlen] that the stage reads; None where it needs
    no text or reads it otherwise. `calibration`: what is known of that text. `digest`: sha256 of all text it reads.
    """

    index: int
    stage: BaseStage
    jobs: tuple[MatrixJob, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    windows: Tensor | None = field(default=None, compare=False)
    calibration: TextSource | None = None

    @property
    def name(self) -> str:
        return f"{self.index}-{self.stage.stage}"

    @property
    def digest(self) -> str | None:
        return None if self.calibration is None else self.calibration.digest

    @property
    def said(self) -> str | None:
        """What the plan says of the stage besides its matrices, in one line."""
        return None

    def check_before(self, pruned: float) -> None:
        """RecipeError when this share of the weights of its matrices must not be zero before it."""

    @property
    def untie(self) -> bool:
        """Whether the stage gives the head a weight of its own."""
        return False

    @property
    def layerwise(self) -> bool:
        """Whether its parts hold the matrices of its jobs alone; else they hold the whole model."""
        return False


@dataclass(frozen=True)
class PrunePlan(StagePlan):
    """A prune stage."""

    stage: PruneStage

    @property
    def untie(self) -> bool:
        return self.stage.untie

    @property
    def layerwise(self) -> bool:
        return True


@dataclass(frozen=True)
class EvaluatePlan(StagePlan):
    """An evaluate stage: `windows` are those of the evaluation text, `protocol` says how they were cut."""

    stage: EvaluateStage
    windows: Tensor = field(compare=False, kw_only=True)
    protocol: Protocol = field(kw_only=True)
    text_digest: str = field(kw_only=True)

    @property
    def digest(self) -> str:
        return self.text_digest


@dataclass(frozen=True)
class Planning:
    """What a stage may look at while it is planned: no weight has been read."""

    model: str
    recipe: Recipe
    machine: Machine
    source: FolderSource
    skeleton: StreamedModel
    texts: Texts
    device: str
    trust_remote_code: bool


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know. `stages`: in the order in which they run. `estimate`: bytes and memory, once it
    is known where the output goes."""

    model: str
    source: FolderSource
    skeleton: StreamedModel
    recipe: Recipe
    machine: Machine
    device: str
    trust_remote_code: bool
    stages: tuple[StagePlan, ...]
    overlap: float | None
    estimate: Estimate | None = None

    @property
    def changes(self) -> list[StagePlan]:
        """The stages that change weights, in order."""
        return [stage for stage in self.stages if stage.stage.changes_weights]


def make_plan(
    model: str,
    recipe: Recipe,
    machine: Machine,
    *,
    source: FolderSource,
    skeleton: StreamedModel,
    device: str,
    trust_remote_code: bool,
) -> Plan:
    """Jobs and windows of every stage. RecipeError (or DataError) listing all that is wrong."""
    problems: list[GossamerError] = []
    texts = Texts(source.folder, recipe, skeleton)
    planning = Planning(model, recipe, machine, source, skeleton, texts, device, trust_remote_code)
    stages: list[StagePlan] = []
    for index, stage in enumerate(recipe.stages):
        if stage.stage == "export":
            continue
        try:
            stages.append(stage_kind(stage.stage).plan(index, stage, planning))
        except GossamerError as error:
            problems.append(error)
    overlap = None
    ordered = tuple(in_order(stages))
    for check in (
        lambda: check_attachments(recipe, source),
        lambda: check_values(recipe, source, ordered),
        lambda: check_targets(ordered, source),
        texts.check_overlap,
    ):
        if problems:
            break
        try:
            overlap = check()
        except GossamerError as error:
            problems.append(error)
    if problems:
        raise _all_of(problems)
    return Plan(model, source, skeleton, recipe, machine, device, trust_remote_code, ordered, overlap)


def in_order(stages: Sequence[StagePlan]) -> list[StagePlan]:
    """Stages as they run: what is attached beside the weights comes right after the last stage that changes weights."""
    last = max((i for i, stage in enumerate(stages) if stage.stage.changes_weights), default=-1)
    early = [stage for stage in stages[: last + 1] if stage.stage.attaches]
    first = [stage for stage in stages[: last + 1] if not stage.stage.attaches]
    return [*first, *early, *stages[last + 1 :]]


def sequence_length(given: int | None, limit: int | None, option: str) -> int:
    """`given`, or min(2048, the model's positions). RecipeError below 2 and beyond the model's positions."""
    if given is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if given < 2:
        raise RecipeError(f"{option} must be at least 2, got {given}", hint="a window predicts all its tokens but one")
    if limit is not None and given > limit:
        raise RecipeError(f"{option} {given} is longer than the model's {limit} positions", hint=f"use at most {limit}")
    return given


def evaluation_dtype(machine: Machine) -> torch.dtype:
    """float32 unless a dtype was asked for, so that a perplexity does not depend on the checkpoint's dtype."""
    return torch.float32 if machine.dtype == "auto" else getattr(torch, machine.dtype)


def calibration_dtype(machine: Machine, own: torch.dtype, device: str) -> torch.dtype:
    """In which activations are calibrated: bfloat16 for a checkpoint of it where the device multiplies it, or as asked.

    float16 would lose gradients.
    """
    if machine.dtype == "auto" and own == torch.bfloat16 and (torch.device(device).type != "cpu" or _multiplies()):
        return torch.bfloat16
    return evaluation_dtype(machine)


def _multiplies() -> bool:
    """Whether this build of torch multiplies bfloat16 with vector instructions on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _all_of(problems: list[GossamerError]) -> GossamerError:
    problems = list({problem.message: problem for problem in problems}.values())
    if len(problems) == 1:
        return problems[0]
    kind = DataError if all(isinstance(problem, DataError) for problem in problems) else RecipeError
    shown = "; ".join(problem.message for problem in problems[:SHOWN_PROBLEMS])
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    hints = list(dict.fromkeys(problem.hint for problem in problems if problem.hint))
    return kind(f"{len(problems)} problems: {shown}{more}", hint="; ".join(hints) or None)


def check_output(out: Path, *, overwrite: bool, resume: bool) -> None:
    """RecipeError when `out` is taken, or its partial run would be lost."""
    partial = partial_of(out)
    if not overwrite and not (resume and begun(partial)):
        require_free(out)
    if partial.exists() and not resume and not overwrite:
        raise RecipeError(
            f"{partial} holds an unfinished run", hint="continue it with --resume, or throw it away with --overwrite"
        )


def require_free(out: Path) -> None:
    """RecipeError when `out` exists and is anything but an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(
            f"{out} exists and is not empty", hint="choose another folder, or replace it with --overwrite"
        )


def partial_of(out: Path) -> Path:
    """The folder where a run works until OUT is verified."""
    return out.with_name(out.name + ".partial")
