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

from ...finetune.schedules import Rates
from ...pruning.imp import Phase, phase_patterns, run_phases, tighten
from ...pruning.mask import Mask
from .. import distributed
from ..failpoint import failpoint
from ..jobs import MatrixJob
from ..plan import PrunePlan
from ..stage_recipes.imp import ImpStage
from ..stage_recipes.prune import PruneStage
from ..whole import kept_of, matrix_in, open_whole
from .base import Context, StageReport
from .masked_model import Masked
from .prune import PruneRun
from .targets import TargetPlan


@dataclass(frozen=True)
class ScorePlan(PrunePlan):
    """One-shot pruning inside a phase. `label` makes its folder and its units in the journal its own."""

    label: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        return self.label


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
        if self.stage.schedule == "allr" and not damage["pruned"]:
            self.context.progress.note(f"phase {phase.number} prunes nothing: its learning rate is that of llr")

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
