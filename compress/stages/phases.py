"""Prune, retrain, prune again: the stages whose model goes through several phases, each of them safe on disk.

What a phase leaves is its model and masks as they were trained (`wholestate`), and its entry in the journal. A run that
was killed goes on with the phase that it was in, from the trainer's newest checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RecipeError
from ...finetune.schedules import Rates
from ...finetune.tokens import TokenRows
from ...pruning.imp import MIXED, Phase, phase_patterns, phase_rate, run_phases, tighten
from ...pruning.mask import Mask
from ...pruning.pattern import Pattern, Unstructured, parse_pattern
from .. import distributed
from ..failpoint import failpoint
from ..jobs import MatrixJob, left_out, matrix_jobs, select
from ..plan import Planning, PrunePlan
from ..stage_recipes.imp import ImpStage
from ..stage_recipes.prune import PruneStage
from ..stage_recipes.target import TargetStage
from ..training import TrainingPlan, training_plan
from ..whole import kept_of, matrix_in, open_whole, view, write_whole
from ..wholestate import StateFile, gathered, is_sharded, load_tensors, whole_tensors, write_state
from .base import Context, StageReport
from .prune import PruneRun

ROUNDING = 0.005  # a whole number of zeros per row may exceed the sparsity that was asked for by this much


@dataclass(frozen=True)
class TargetPlan(TrainingPlan):
    """A training stage that prunes: `pattern` is that of its end."""

    stage: TargetStage
    pattern: Pattern = field(kw_only=True)

    def check_before(self, pruned: float) -> None:
        phase_rate(self.pattern.sparsity, 1, self.initial(pruned))

    def initial(self, pruned: float) -> float:
        """The sparsity to begin with when `pruned` of the weights are: more than the target only if that is a mistake.

        Groups and blocks may be fuller than their pattern, and rows are rounded.
        """
        target = self.pattern.sparsity
        more = pruned - target
        return target if more > 0 and (more < ROUNDING or not isinstance(self.pattern, Unstructured)) else pruned


@dataclass(frozen=True)
class SoupPlan(TargetPlan):
    """`measured`: rows on which everything is compared once, at the end; nothing is chosen on them."""

    measured: TokenRows | None = field(default=None, compare=False, kw_only=True)


@dataclass(frozen=True)
class ScorePlan(PrunePlan):
    """One-shot pruning inside a phase. `label` makes its folder and its units in the journal its own."""

    label: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        return self.label


def target_plan(index: int, stage: TargetStage, planning: Planning) -> TargetPlan:
    """Jobs, text and pattern. RecipeError or DataError for what does not fit."""
    pattern = parse_pattern(stage.pattern_text, stage.unit)
    chosen, excluded = select(stage, planning.skeleton)
    head = [prunable for prunable in chosen if prunable.kind == "head"]
    if head:
        raise RecipeError(
            f"{head[0].name} is not pruned by stage {stage.stage}", hint="leave --include of the head to a prune stage"
        )
    jobs = matrix_jobs(pattern, chosen, planning.skeleton)
    skipped = left_out(planning.skeleton, excluded)
    return TargetPlan(index, stage, jobs, skipped, pattern=pattern, **training_plan(stage, planning))


def phase_steps(total: int, phases: int) -> list[int]:
    """`total` optimizer steps over the phases. RecipeError when one would have none."""
    if total < phases:
        raise RecipeError(
            f"{total} steps are too few for {phases} phases", hint="give more --tokens or --steps, or fewer --phases"
        )
    return [total * (p + 1) // phases - total * p // phases for p in range(phases)]


class Masked:
    """The model of a stage, its masks, and both as the leaf functions of `pruning` see them: matrix by matrix."""

    def __init__(self, context: Context, plan: TargetPlan) -> None:
        self.context, self.plan = context, plan
        self.model: Any = open_whole(context)
        self.masks: dict[str, Tensor] = kept_of(self.model, plan.jobs)
        self.patterns: dict[str, set[str]] = {}

    def weights(self) -> dict[str, Tensor]:
        """[out, in] of every matrix, to read. While parameters are sharded, every rank has to call it."""
        names = dict.fromkeys(job.prunable.parameter for job in self.plan.jobs)
        whole = {name: gathered(self.model.get_parameter(name).data) for name in names}
        return {job.name: matrix_in(whole, self.model, job.prunable) for job in self.plan.jobs}

    def matrix_masks(self) -> dict[str, Mask]:
        return {
            job.name: Mask.from_bool(matrix_in(self.masks, self.model, job.prunable).contiguous(), "")
            for job in self.plan.jobs
        }

    @property
    def sparsity(self) -> float:
        """Of the matrices that the stage prunes."""
        size = sum(job.size for job in self.plan.jobs)
        return sum(mask.zeros for mask in self.matrix_masks().values()) / size

    @torch.no_grad()
    def set_masks(self, found: dict[str, Mask]) -> dict[str, float]:
        """Take over masks of the matrices and zero what they prune.

        Returns:
            `damage`: ||W - W_pruned|| / ||W|| over all parameters; `pruned`: share of the remaining weights that went.
        """
        before = sum(float(p.double().square().sum()) for p in self.model.parameters())
        share = self.take_masks(found)
        gone = 0.0
        for job in self.plan.jobs:
            keep, weight = matrix_in(self.masks, self.model, job.prunable), view(self.model, job.prunable)
            gone += float(weight[~keep].double().square().sum())
            weight.masked_fill_(~keep, 0.0)
        return {"damage": (gone / before) ** 0.5 if before else 0.0, "pruned": share}

    def take_masks(self, found: dict[str, Mask]) -> float:
        """Take over masks of the matrices, weights untouched; the share of the remaining weights that they prune."""
        remaining = went = 0
        self.patterns = {}
        for job in self.plan.jobs:
            mask = matrix_in(self.masks, self.model, job.prunable)
            keep = found[job.name].to_bool().to(mask.device)
            remaining += int(mask.sum())
            went += int((mask & ~keep).sum())
            mask.copy_(keep)
            self.patterns.setdefault(job.prunable.parameter, set()).add(found[job.name].pattern)
        return went / remaining if remaining else 0.0

    def reopen(self, path: Path) -> None:
        """A fresh model with the state of `path`: after sharded training, or when a run goes on."""
        self.model = open_whole(self.context)
        self.restore(path)

    def restore(self, path: Path) -> None:
        """The state and masks of `path`."""
        held = StateFile(path)
        load_tensors(self.model, held.tensors())
        for name, mask in held.masks(self.masks).items():
            self.masks[name] = mask

    def save(self, path: Path) -> None:
        """Every rank calls it; one writes."""
        tensors = whole_tensors(self.model)
        distributed.on_main(lambda: write_state(path, tensors, self.masks))
        if is_sharded(self.model):
            self.reopen(path)

    def write(self, folder: Path) -> None:
        """Part files of the stage."""
        promises = {name: MIXED for name in self.masks if name not in self.model.gossamer_masks}
        promises |= {name: min(texts) if len(texts) == 1 else MIXED for name, texts in self.patterns.items()}
        distributed.on_main(lambda: write_whole(self.context, self.model, self.masks, promises, folder))

    def layers(self, method: str) -> list[dict[str, Any]]:
        """A row per matrix for the report; `method` is what pruned it."""
        masks = self.matrix_masks()
        return [
            {
                "name": job.name,
                "block": job.prunable.block,
                "shape": list(job.prunable.shape),
                "pattern": "/".join(sorted(self.patterns.get(job.prunable.parameter, {MIXED}))),
                "method": method,
                "zeros": masks[job.name].zeros,
                "sparsity": round(masks[job.name].zeros / job.size, 6),
                "tokens": None,
                "error_before": None,
                "error_after": None,
                "seconds": 0.0,
            }
            for job in self.plan.jobs
        ]


class PhasedRun:
    """Runs the phases of an imp or soup stage. `retrain(masked, phase, rates)` trains and returns the phase's entry."""

    def __init__(
        self, context: Context, plan: TargetPlan, retrain: Callable[[Masked, Phase, Rates], dict[str, Any]]
    ) -> None:
        assert isinstance(plan.stage, ImpStage)
        self.context, self.plan, self.stage = context, plan, plan.stage
        self.folder = context.state_folder(plan)
        self._retrain_masked = retrain
        self._rates = Rates(plan.stage.learning_rate)

    def run(self) -> StageReport:
        """All phases that the journal does not hold yet; then the parts."""
        started = time.monotonic()
        self.context.progress.working("open the model")
        masked = Masked(self.context, self.plan)
        patterns = phase_patterns(self.plan.pattern, self.stage.phases, self.plan.initial(masked.sparsity))
        entries = self._finished()
        if entries:
            masked.restore(self._state(len(entries)))
            masked.patterns = {name: set(texts) for name, texts in entries[-1]["patterns"].items()}
        for phase, entry in run_phases(masked, patterns, self._prune, self._retrain, first=len(entries) + 1):
            self._finish(masked, phase, entry)
            entries.append(entry)
        folder = self.context.part_folder(self.plan)
        masked.write(folder)
        result = {
            "phases": [{k: v for k, v in entry.items() if k not in ("training", "patterns")} for entry in entries],
            "layers": masked.layers(f"{self.stage.stage} ({self.stage.score})"),
            "training": [run for entry in entries for run in entry["training"]],
        }
        return StageReport(self.stage.stage, self.plan.index, time.monotonic() - started, result)

    def _unit(self, number: int) -> str:
        return f"{self.plan.name}/phase-{number}"

    def _state(self, number: int) -> Path:
        return self.folder / f"after-phase-{number}.safetensors"

    def _finished(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        while (done := self.context.journal.done(self._unit(len(entries) + 1))) is not None:
            entries.append(done)
        return entries

    def _prune(self, masked: Masked, phase: Phase) -> None:
        self.context.progress.working(f"phase {phase.number}: prune to {phase.pattern}")
        if self.stage.score == "magnitude":
            found = tighten(masked.weights(), masked.matrix_masks(), phase.pattern)
            damage = masked.set_masks(found)
        else:
            damage = self._prune_with_method(masked, phase)
        self._rates = Rates(self.stage.learning_rate, damage=damage["damage"], pruned=damage["pruned"])

    def _prune_with_method(self, masked: Masked, phase: Phase) -> dict[str, float]:
        """A one-shot method on the model so far, block by block as in a prune stage; it may change weights too."""
        before = self.context.work / f"{self._label(phase.number)}-before"
        masked.write(before)
        inner = replace(self.context, finished=[*self.context.finished, before])
        jobs = tuple(MatrixJob(job.prunable, phase.pattern, job.keys) for job in self.plan.jobs)
        text = self.plan.calibration if self.plan.windows is not None else None
        stage = PruneStage(method=self.stage.score)
        label = self._label(phase.number)
        PruneRun(inner, ScorePlan(self.plan.index, stage, jobs, (), self.plan.windows, text, label=label)).run()
        inner.finished.append(inner.work / label)
        model = open_whole(inner)
        kept = kept_of(model, self.plan.jobs)
        found = {
            job.name: Mask.from_bool(matrix_in(kept, model, job.prunable).contiguous(), str(phase.pattern))
            for job in self.plan.jobs
        }
        damage = masked.set_masks(found)
        masked.model = model
        return damage

    def _label(self, number: int) -> str:
        return f"{self.plan.name}-score-{number}"

    def _retrain(self, masked: Masked, phase: Phase) -> dict[str, Any]:
        entry = self._retrain_masked(masked, phase, self._rates)
        return {
            "phase": phase.number, "pattern": str(phase.pattern), "sparsity": masked.sparsity,
            "damage": self._rates.damage, "pruned": self._rates.pruned, **entry,
        }  # fmt: skip

    def _finish(self, masked: Masked, phase: Phase, entry: dict[str, Any]) -> None:
        masked.save(self._state(phase.number))
        failpoint("phase")
        entry["patterns"] = {name: sorted(texts) for name, texts in masked.patterns.items()}
        self.context.finish(self._unit(phase.number), entry)
        distributed.on_main(lambda: self._forget(phase.number))

    def _forget(self, number: int) -> None:
        """What only an unfinished phase needs: earlier states, the trainer's checkpoints, candidates."""
        self._state(number - 1).unlink(missing_ok=True)
        for name in (self._label(number), f"{self._label(number)}-before"):
            shutil.rmtree(self.context.work / name, ignore_errors=True)
        for path in self.folder.glob(f"phase-{number}*"):
            for checkpoint in [*path.glob("checkpoint-*"), *path.glob("*.safetensors")]:
                shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
