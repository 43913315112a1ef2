"""The plan: from recipe, config.json and safetensors headers to a list of jobs, before a weight is read.

Everything the user could have wrong is looked for here, and all mistakes are reported together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import DataError, GossamerError, RecipeError
from ..pruning.pattern import Pattern, parse_pattern
from ..pruning.registry import get_method
from . import distributed
from .blocks import Prunable, StreamedModel
from .evaluate import Protocol
from .journal import begun
from .recipe import DEFAULT_CALIBRATION, EvaluateStage, Machine, PruneStage, Recipe
from .source import FolderSource
from .text import Texts, TextSource

if TYPE_CHECKING:
    from .estimate import Estimate

DEFAULT_SEQLEN = 2048
SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class MatrixJob:
    """One matrix to prune. `keys`: the checkpoint tensors that hold it."""

    prunable: Prunable
    pattern: Pattern
    keys: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.prunable.name

    @property
    def zeros(self) -> int:
        return self.pattern.zeros(*self.prunable.shape)

    @property
    def size(self) -> int:
        return self.prunable.shape[0] * self.prunable.shape[1]


@dataclass(frozen=True)
class PrunePlan:
    """Jobs of one prune stage. `windows`: tokens [nsamples, seqlen] of `calibration`; None where no text is needed."""

    index: int
    stage: PruneStage
    jobs: tuple[MatrixJob, ...]
    skipped: tuple[tuple[str, str], ...]
    windows: Tensor | None = field(compare=False)
    calibration: TextSource | None

    @property
    def digest(self) -> str | None:
        """sha256 of the calibration text."""
        return None if self.calibration is None else self.calibration.digest

    @property
    def name(self) -> str:
        return f"{self.index}-prune"


@dataclass(frozen=True)
class EvaluatePlan:
    """Windows [n, seqlen] of one evaluate stage and the protocol they follow."""

    index: int
    stage: EvaluateStage
    windows: Tensor = field(compare=False)
    protocol: Protocol
    digest: str

    @property
    def name(self) -> str:
        return f"{self.index}-evaluate"


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know. `estimate`: bytes and memory, once it is known where the output goes."""

    model: str
    source: FolderSource
    skeleton: StreamedModel
    recipe: Recipe
    machine: Machine
    device: str
    trust_remote_code: bool
    stages: tuple[PrunePlan | EvaluatePlan, ...]
    overlap: float | None
    estimate: Estimate | None = None

    @property
    def prunes(self) -> list[PrunePlan]:
        return [stage for stage in self.stages if isinstance(stage, PrunePlan)]


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
    stages: list[PrunePlan | EvaluatePlan] = []
    for index, stage in enumerate(recipe.stages):
        try:
            if isinstance(stage, PruneStage):
                stages.append(_plan_prune(index, stage, recipe, skeleton, texts))
            elif isinstance(stage, EvaluateStage):
                stages.append(_plan_evaluate(index, stage, recipe, skeleton, texts, machine))
        except GossamerError as error:
            problems.append(error)
    overlap = None
    if not problems:
        try:
            overlap = texts.check_overlap()
        except GossamerError as error:
            problems.append(error)
    if problems:
        raise _all_of(problems)
    return Plan(model, source, skeleton, recipe, machine, device, trust_remote_code, tuple(stages), overlap)


def _plan_prune(index: int, stage: PruneStage, recipe: Recipe, model: StreamedModel, texts: Texts) -> PrunePlan:
    method = get_method(stage.method)
    pattern = parse_pattern(stage.pattern_text, str(stage.scope or getattr(method, "scope", "row")))
    if stage.scope == "model" and stage.method != "magnitude":
        raise RecipeError(
            f"scope model is not possible with {stage.method}: its scores are comparable inside one matrix only",
            hint="use --method magnitude, or --allocation owl to spread the sparsity over the blocks",
        )
    chosen, excluded = select(stage, model)
    skipped = [pair for i in range(model.num_blocks) for pair in model.unprunable(i)]
    skipped += [(prunable.name, "excluded") for prunable in excluded]
    check_shapes(pattern, chosen)
    jobs = [MatrixJob(prunable, pattern, tuple(model.source_keys(prunable))) for prunable in chosen]
    if not jobs:
        raise RecipeError(
            "nothing is left to prune", hint="check --include and --exclude; `gossamer inspect` lists names"
        )
    if stage.reconstruct and distributed.world() > 1:
        raise RecipeError(
            f"reconstruct trains on all windows in one process, and {distributed.world()} were started",
            hint="run the same command without a launcher",
        )
    windows = source = None
    needed = bool(method.needs) or stage.reconstruct or stage.allocation == "owl"
    if needed or stage.calibration is not None:
        data = stage.calibration or DEFAULT_CALIBRATION
        seqlen = sequence_length(stage.seqlen, model.max_positions, "--seqlen")
        windows, source = texts.calibration(data, stage.nsamples, seqlen)
    return PrunePlan(index, stage, tuple(jobs), tuple(skipped), windows, source)


def _plan_evaluate(
    index: int, stage: EvaluateStage, recipe: Recipe, model: StreamedModel, texts: Texts, machine: Machine
) -> EvaluatePlan:
    given = stage.seqlen or next((s.seqlen for s in recipe.stages if isinstance(s, PruneStage) and s.seqlen), None)
    seqlen = sequence_length(given, model.max_positions, "--eval-seqlen" if stage.seqlen else "--seqlen")
    windows, protocol, digest = texts.evaluation(stage.data, seqlen, stage.windows, evaluation_dtype(machine))
    return EvaluatePlan(index, stage, windows, protocol, digest)


def select(stage: PruneStage, model: StreamedModel) -> tuple[list[Prunable], list[Prunable]]:
    """(matrices to prune, matrices left out by include/exclude).

    `include` patterns that match matrices inside the blocks keep only those; a pattern that matches the head alone adds
    the head. RecipeError for a pattern that matches nothing, or for a head that shares the embedding's weight.
    """
    inside = [prunable for i in range(model.num_blocks) for prunable in model.prunables(i)]
    head = model.head()
    names = [prunable.name for prunable in inside]
    for option, patterns in (("--include", stage.include), ("--exclude", stage.exclude)):
        for pattern in patterns:
            candidates = [*names, *([head.name] if head else [])]
            if not any(re.search(pattern, name) for name in candidates):
                raise RecipeError(f"{option} {pattern!r} matches no matrix", hint=f"names look like {_examples(names)}")
    filters = [pattern for pattern in stage.include if any(re.search(pattern, name) for name in names)]
    wanted = [p for p in inside if not filters or _matches(p.name, filters)]
    if head is not None and _matches(head.name, stage.include) and not _matches(head.name, filters):
        if model.head_is_tied and not stage.untie:
            raise RecipeError(
                f"{head.name} shares its weight with the input embedding, which is never pruned",
                hint="add --untie to give the head a weight of its own",
            )
        wanted.append(head)
    kept = [p for p in wanted if not _matches(p.name, stage.exclude)]
    names_kept = {p.name for p in kept}
    return kept, [p for p in inside if p.name not in names_kept]


def check_shapes(pattern: Pattern, chosen: list[Prunable]) -> None:
    """RecipeError, one for all, unless the pattern fits every matrix."""
    unfit = {prunable.name: _misfit(pattern, *prunable.shape, prunable.name) for prunable in chosen}
    errors = {name: error for name, error in unfit.items() if error is not None}
    if not errors:
        return
    first = next(iter(errors.values()))
    if len(errors) == 1:
        raise first
    shapes = [prunable.shape for prunable in chosen if prunable.name in errors]
    rows, cols = (math.gcd(*sizes) for sizes in zip(*shapes, strict=True))
    common = _misfit(pattern, rows, cols, "all of them")  # what divides the common divisor divides every one
    advice = ((common and common.hint) or "").partition(", or ")[2]
    kinds = list(dict.fromkeys(_kind(name) for name in errors))
    message = f"{first.message}; the same with {len(errors) - 1} more of {len(chosen)} matrices"
    if len(errors) < len(chosen):
        advice = f"leave them out with --exclude '({'|'.join(kinds)})', or {advice}"
    raise RecipeError(message, hint=advice or None)


def _misfit(pattern: Pattern, rows: int, cols: int, name: str) -> GossamerError | None:
    try:
        pattern.check(rows, cols, name)
    except GossamerError as error:
        return error
    return None


def _kind(name: str) -> str:
    """The last part of a name that is no number: what the matrix is called in every block."""
    return next(part for part in reversed(name.split(".")) if not part.isdigit())


def sequence_length(given: int | None, limit: int | None, option: str) -> int:
    """`given`, or min(2048, the model's positions). RecipeError beyond the model's positions."""
    if given is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and given > limit:
        raise RecipeError(f"{option} {given} is longer than the model's {limit} positions", hint=f"use at most {limit}")
    return given


def evaluation_dtype(machine: Machine) -> torch.dtype:
    """float32 unless a dtype was asked for, so that a perplexity does not depend on the checkpoint's dtype."""
    return torch.float32 if machine.dtype == "auto" else getattr(torch, machine.dtype)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _examples(names: list[str]) -> str:
    return ", ".join(names[:3])


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
