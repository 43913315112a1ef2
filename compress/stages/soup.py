"""The soup stage: in every phase several candidates from one parent under one mask, and their average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...errors import TrainingError
from ...finetune.schedules import Rates
from ...finetune.tokens import TokenRows
from ...finetune.training import TrainingConfig
from ...pruning.factors import candidates, get_factor
from ...pruning.imp import Phase
from ...pruning.mean import check_same_masks, has_statistics, masks_sha256
from ...pruning.soup import check_count
from .. import distributed
from ..checkpoint import atomic_write_text
from ..needs import Needs
from ..plan import Plan, Planning
from ..soups import (
    apart,
    log_probabilities,
    own_run,
    owner_of,
    per_row,
    teams,
    trains,
)
from ..stage_recipes.imp import SoupStage
from ..training import heldout_rows, metrics_entry, retrainer, training_config, training_needs
from ..wholestate import StateFile, load_tensors, packed_masks, whole_tensors, write_state
from .base import Context, StageReport
from .imp import Imp, mean, phase_seed
from .masked_model import Masked
from .phases import PhasedRun
from .soup_choice import Choice, SoupPlan, measure_statistics
from .targets import phase_steps

VARIABLE = ("learning_rate", "weight_decay", "warmup", "momentum", "clip", "batch", "accumulation")


class SoupKind:
    """P phases: prune the parent once, train the candidates, go on with their average."""

    def plan(self, index: int, stage: SoupStage, planning: Planning) -> SoupPlan:
        """As `Imp.plan`, and the text on which everything is compared at the end."""
        check_count(stage.candidates, teams())
        found = Imp().plan(index, stage, planning)
        for steps in phase_steps(found.steps, stage.phases):
            varied(stage, steps, planning.recipe.seed)
        rows = None
        if stage.measure is not None:
            windows, _, _ = planning.texts.evaluation(
                stage.measure, found.text.train.length, stage.measure_windows, torch.float32
            )
            rows = TokenRows(windows, name=stage.measure)
        return SoupPlan(**vars(found), measured=rows)

    def needs(self, plan: Plan, stage: SoupPlan) -> Needs:
        found = training_needs(plan, stage)
        assert isinstance(stage.stage, SoupStage)
        parameters = sum(torch.Size(plan.source.meta(key).shape).numel() for key in plan.source.keys())
        return Needs(found.peak, found.disk + 4 * parameters * (stage.stage.candidates + 2))

    def run(self, context: Context, stage: SoupPlan) -> StageReport:
        return PhasedRun(context, stage, SoupPhase(context, stage)).run()


def varied(stage: SoupStage, steps: int, seed: int) -> list[dict[str, Any]]:
    """What the candidates of a phase of `steps` steps may differ in, one dict each. RecipeError if they do not."""
    base = {name: getattr(stage, name) for name in VARIABLE} | {"steps": steps, "seed": seed}
    return candidates(base, stage.factor, stage.candidates, stage.factor_values)


class SoupPhase:
    """What a phase of a soup does instead of one retraining."""

    def __init__(self, context: Context, plan: SoupPlan) -> None:
        assert isinstance(plan.stage, SoupStage)
        self.context, self.plan, self.stage = context, plan, plan.stage
        self.retrain = retrainer(context, plan)
        self.steps = phase_steps(plan.steps, plan.stage.phases)

    def __call__(self, masked: Masked, phase: Phase, rates: Rates) -> dict[str, Any]:
        """Train the candidates, leave the soup in `masked.model`; the phase's entry."""
        self.rows = heldout_rows(self.plan, masked.model)
        folder = self.context.state_folder(self.plan) / f"phase-{phase.number}"
        distributed.on_main(
            lambda: write_state(folder / "parent.safetensors", whole_tensors(masked.model), masked.masks)
        )
        digest = self._agreed_digest(masked)
        paths = [folder / f"candidate-{i + 1}.safetensors" for i in range(self.stage.candidates)]
        last = phase.number == phase.of
        with apart():
            for index, path in enumerate(paths):
                if trains(index) and not path.exists():
                    self._train(masked, phase, index, rates, folder, last)
        entries = self._collect(paths, masked, digest)
        chosen = Choice(self.plan, self.rows, masked.model, paths, entries).choose(last=last)
        entry = {key: value for key, value in chosen.items() if key != "weights"}
        return {
            "masks_sha256": digest,
            "factor": self.stage.factor,
            "candidates": [
                {k: v for k, v in e.items() if k not in ("training", "log_p", "measured_p")} for e in entries
            ],
            "soup": self.stage.soup,
            "weights": list(chosen["weights"]),
            **entry,
            "training": [e["training"] for e in entries],
        }

    # ---- candidates ----

    def _configs(self, phase: Phase, rates: Rates) -> list[tuple[Any, TrainingConfig]]:
        """(value of the factor, configuration) of every candidate."""
        field = get_factor(self.stage.factor).field
        found = varied(self.stage, self.steps[phase.number - 1], phase_seed(self.context, phase.number))
        return [
            (
                changes[field],
                training_config(
                    self.context, self.plan, f"phase-{phase.number}-candidate-{number}", rates=rates, **changes
                ),
            )
            for number, changes in enumerate(found, 1)
        ]

    def _train(self, masked: Masked, phase: Phase, index: int, rates: Rates, folder: Path, last: bool) -> None:
        """One candidate, by this process or by all; its state appears when it is complete."""
        value, config = self._configs(phase, rates)[index]
        load_tensors(masked.model, StateFile(folder / "parent.safetensors").tensors())
        try:
            with own_run():
                metrics = self.retrain(masked.model, config, masked.masks)
        except TrainingError as error:  # the same object: it knows whose failure it is
            which = f"candidate {index + 1} of phase {phase.number} ({self.stage.factor} {value})"
            error.message = f"{which}: {error.message}"
            raise
        if has_statistics(masked.model):
            measure_statistics(masked.model, self.plan)
        more = {"log_p": log_probabilities(masked.model, self.rows, self.stage.batch)}
        if last and self.plan.measured is not None:
            more["measured_p"] = log_probabilities(masked.model, self.plan.measured, self.stage.batch)
        name = f"phase-{phase.number}-candidate-{index + 1}"
        entry = {"candidate": index + 1, "value": value, "training": metrics_entry(metrics, name)}
        tensors = whole_tensors(masked.model)

        def write() -> None:
            atomic_write_text(folder / f"candidate-{index + 1}.json", json.dumps(entry))
            write_state(folder / f"candidate-{index + 1}.safetensors", tensors, masked.masks, more)

        distributed.on_main(write) if distributed.sharded() else write()

    def _collect(self, paths: list[Path], masked: Masked, digest: str) -> list[dict[str, Any]]:
        """Entries of all candidates, from the processes that trained them. CheckpointError for another mask."""
        own: dict[int, dict[str, Any]] = {}
        with distributed.agreed():
            for index, path in enumerate(paths):
                if owner_of(index) != distributed.rank():
                    continue
                held = StateFile(path)
                if held.masks_sha256(masked.masks) != digest:
                    check_same_masks(
                        [packed_masks(masked.masks), packed_masks(held.masks(masked.masks))],
                        ["the parent", f"candidate {index + 1}"],
                    )
                entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                more = held.more()
                own[index] = {
                    **entry, "heldout": mean(per_row(more["log_p"], self.rows)), "log_p": more["log_p"],
                    "measured_p": more.get("measured_p"),
                }  # fmt: skip
        found: dict[int, dict[str, Any]] = {}
        for part in distributed.from_all(own):
            found |= part
        return [found[index] for index in range(len(paths))]

    def _agreed_digest(self, masked: Masked) -> str:
        """The digest of the masks, which must be the same on every rank."""
        own = packed_masks(masked.masks)
        digest = masks_sha256(own)
        if len(set(distributed.from_all(digest))) > 1:
            theirs = distributed.from_all(own)
            check_same_masks(theirs, [f"rank {rank}" for rank in range(len(theirs))])
        return digest
