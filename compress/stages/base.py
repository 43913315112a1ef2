"""What every stage works with: the plan, the partial folder, the journal, and the tensors as they stand so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..blocks import StreamedModel
from ..journal import Journal
from ..plan import Plan, StagePlan
from ..progress import Recorder
from ..source import OverlaySource, StoredSource
from ..values import with_values


@dataclass
class Context:
    """State of one run. `finished`: part folders of the stages that changed weights and are complete, in order.

    `attached`: reports of the stages that add something beside the weights. `files`: what finished stages wrote with
    `attachment`, as paths below `work`.
    """

    plan: Plan
    partial: Path
    journal: Journal
    progress: Recorder
    finished: list[Path] = field(default_factory=list)
    attached: list[StageReport] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """Parts and spilled hidden states; removed before the checkpoint is published."""
        return self.partial / "work"

    @property
    def scratch(self) -> Path:
        """A folder for files that no resumed run needs."""
        folder = self.work / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def part_folder(self, stage: StagePlan) -> Path:
        """Where `stage` leaves its part files; what is there survives a kill."""
        folder = self.work / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def state_folder(self, stage: StagePlan) -> Path:
        """Where `stage` keeps what it needs to go on after a kill, such as a trainer's checkpoints."""
        folder = self.work / "state" / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def attachment(self, stage: StagePlan, name: str) -> Path:
        """Where `stage` writes a file that will be OUT/gossamer/`name`; it also goes into the report's `files`."""
        folder = self.work / "attached" / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def finish(self, unit: str, result: dict[str, Any]) -> None:
        """Every rank calls it when `unit` is done; the journal is written once, and nobody goes on before it is."""
        distributed.on_main(lambda: self.journal.finish(unit, result))

    def current(self) -> StoredSource:
        """The model's tensors after the stages finished so far."""
        source: StoredSource = self.plan.source
        for folder in self.finished:
            source = OverlaySource(source, folder)
        return source

    def written(self) -> StoredSource:
        """The same as the checkpoint will hold them: rounded, if the recipe says so."""
        return with_values(self.current(), self.plan.recipe.export.values)

    @property
    def untied(self) -> bool:
        """Whether a finished stage gave the head a weight of its own."""
        return any(stage.untie for stage in self.plan.changes[: len(self.finished)])

    @property
    def head_changed(self) -> bool:
        """Whether what is written outside the blocks may differ from the source: the output matrix was untied, pruned
        or trained, or has a mask from before and is rounded now."""
        stages = self.plan.changes[: len(self.finished)]
        if (
            self.untied
            or not all(stage.layerwise for stage in stages)
            or any(job.prunable.kind == "head" for stage in stages for job in stage.jobs)
        ):
            return True
        outer = self.plan.skeleton.outer_keys() if self.plan.recipe.export.values == "int8" else []
        return any(self.plan.source.record(key) is not None for key in outer)

    def open(self, source: Any, dtype: torch.dtype | None, *, untie: bool = False) -> StreamedModel:
        """A streamed model over `source` (a TensorSource), on the run's device."""
        plan = self.plan
        return StreamedModel.open(
            source,
            plan.source.folder,
            dtype=dtype,
            device=plan.device,
            trust_remote_code=plan.trust_remote_code,
            untie=untie,
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """Compute dtype of pruning: None means the checkpoint's own."""
        name = self.plan.machine.dtype
        return None if name == "auto" else getattr(torch, name)


@dataclass(frozen=True)
class StageReport:
    """What a stage adds to the report: `kind`, seconds, and rows or figures of its own.

    `layers` in `result`: one row per pruned matrix (docs/report.md). `entry`: what an attaching stage says under its
    name in config.json; `files`: what it wrote with `Context.attachment`, as paths below the folder of unfinished work.
    """

    kind: str
    index: int
    seconds: float
    result: dict[str, Any]
    entry: dict[str, Any] | None = None
    files: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"stage": self.kind, "index": self.index, "seconds": round(self.seconds, 3), **self.result}
