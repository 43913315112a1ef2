"""One-shot pruning, streamed: one decoder block in memory at a time, its result durable before the next one starts."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from ...pruning.base import LayerStats
from ...pruning.registry import get_method
from .. import distributed, memory
from ..blocks import Prunable, StreamedModel
from ..calibration import collect
from ..evaluate import propagate
from ..failpoint import failpoint
from ..jobs import MatrixJob
from ..masks import MaskSource
from ..plan import PrunePlan
from ..progress import BlockDone
from ..residual import Places, residual_places
from ..source import OverlaySource
from ..timing import Clock
from .base import Context, StageReport
from .budget import budgets
from .matrix import MatrixPruner
from .parts import part_path, write_exported
from .prune_head import head_jobs, prune_head
from .rebuild import rebuild
from .streams import Streams, open_streams


class PruneRun:
    """Runs one prune stage; `run` returns its report."""

    matrices: MatrixPruner

    def __init__(self, context: Context, plan: PrunePlan) -> None:
        self.context = context
        self.plan = plan
        self.method = get_method(plan.stage.method)
        self.folder = context.part_folder(plan)
        before = context.current()
        untie = plan.stage.untie or context.untied
        self.model = context.open(before, context.dtype, untie=untie)
        self.dense = self.model if not context.finished else context.open(context.plan.source, context.dtype)
        self.masks = context.open(MaskSource(before), None, untie=untie) if before.records() else None
        self.needs = self._needs()
        self.rebuilt: list[dict[str, Any]] = []
        self._places_of_kind: dict[Any, Places] = {}

    def _needs(self) -> frozenset[str]:
        if self.plan.windows is None:
            return frozenset()
        return self.method.needs | {"gram"}  # the Gram matrix also measures the error in the report

    @property
    def _asymmetric(self) -> bool:
        return "target" in self.needs or self.plan.stage.reconstruct

    def run(self) -> StageReport:
        """Prune every block that the journal does not hold yet."""
        started = time.monotonic()
        patterns = budgets(self.context, self.plan, self.model)
        self.matrices = MatrixPruner(self.method, self.model, patterns, self.context.progress)
        rows: list[dict[str, Any]] = []
        blocks = self.model.num_blocks
        self.context.progress.stage(f"prune with {self.method.name}", blocks)
        streams = open_streams(self.context, self.plan, self.model, dense=self._asymmetric)
        memory.release()  # what reading text and embedding left would stand below the first block's peak
        clock = Clock(blocks)
        try:
            for index in range(blocks):
                done = self.context.journal.done(self._unit(index))
                if done is None:
                    block_rows = self._block(index, streams)
                    self._finish(index, block_rows, clock)
                else:
                    block_rows = done["rows"]
                    self.rebuilt += done["rebuilt"]
                    self._replay(index, streams)
                    clock.skip()
                rows += block_rows
                memory.release()
            rows += prune_head(self.context, self.plan, self.matrices, streams, self.needs, self.folder)
        finally:
            if streams is not None:
                streams.close()
        return StageReport(
            "prune", self.plan.index, time.monotonic() - started, {"layers": rows, "rebuilt": self.rebuilt}
        )

    def _unit(self, index: int) -> str:
        return f"{self.plan.name}/block-{index:05d}"

    def _block(self, index: int, streams: Streams | None) -> list[dict[str, Any]]:
        with distributed.agreed():
            block = self.model.load_block(index)
            _check_finite(block, self.model.block_names[index])
        jobs = {job.name: job for job in self.plan.jobs if job.prunable.block == index}
        keep = self._masks_so_far(index)
        dense_block = self.dense.load_block(index) if self._asymmetric else None
        masks: dict[str, Tensor] = {}
        rows: list[dict[str, Any]] = []
        places = self._places(index, block, streams)
        passed: set[int] = set()  # windows that the dense block has run to its end
        steps = self._groups(index, block, streams, jobs)
        for number, groups in enumerate(steps, 1):
            stats: dict[str, LayerStats] = {}
            if streams is not None:
                self.context.progress.working(f"measure {groups[0][0].name}")
                stats = collect(
                    self.model, index, block, dense_block, groups,
                    streams.hidden, streams.dense, streams.args, self.needs, streams.windows, places,
                    passed if number == len(steps) else None,
                )  # fmt: skip
                failpoint("calibration")
            members = [member for group in groups for member in group if member.name in jobs]
            for position, member in enumerate(members):
                self.context.progress.working(f"prune {member.name}")
                row, mask = self.matrices.prune(block, jobs[member.name], stats.pop(member.name, None), keep, position)
                masks[member.name] = mask
                rows.append(row)
        self._propagate(index, block, dense_block, streams, masks, passed)
        if masks:
            promises = self._promises(jobs.values(), keep)
            distributed.on_main(lambda: self._write(index, block, masks, promises))
        return rows

    def _write(self, index: int, block: torch.nn.Module, masks: dict[str, Tensor], promises: dict[str, str]) -> None:
        write_exported(part_path(self.folder, index), self.model.export_block(index, block, masks), promises)

    def _promises(self, jobs: Iterable[MatrixJob], keep: dict[str, Tensor]) -> dict[str, str]:
        """Checkpoint key -> the pattern its mask holds; "mixed" where matrices or stages differ."""
        found: dict[str, set[str]] = {}
        for job in jobs:
            text = str(self.matrices.patterns[job.name])
            shrunk = job.name in keep and text.startswith("block")
            for key in job.keys:
                found.setdefault(key, set()).add("mixed" if shrunk else text)
        return {key: texts.pop() if len(texts) == 1 else "mixed" for key, texts in found.items()}

    def _places(self, index: int, block: torch.nn.Module, streams: Streams | None) -> Places:
        """Where matrices of this block write into the residual stream; found once for all blocks of its kind."""
        if streams is None or "target" not in self.needs:
            return {}
        root = self.model.block_names[index]
        kind = tuple((name, type(module)) for name, module in block.named_modules())
        if kind not in self._places_of_kind:
            places = residual_places(self.model, index, block, streams.hidden.get(0), streams.args, 0)
            self._places_of_kind[kind] = {name.removeprefix(root): place for name, place in places.items()}
        return {root + name: place for name, place in self._places_of_kind[kind].items()}

    def _groups(
        self, index: int, block: torch.nn.Module, streams: Streams | None, jobs: dict[str, MatrixJob]
    ) -> Sequence[Sequence[Sequence[Prunable]]]:
        """Lists of groups whose statistics are gathered together, in the order in which they are pruned."""
        if not jobs:
            return []
        if streams is None:
            return [[[job.prunable] for job in jobs.values()]]
        steps = self.model.input_steps(index, block, streams.hidden.get(0), streams.args)
        steps = [[[m for m in group if m.name in jobs] for group in step] for step in steps]
        steps = [[group for group in step if group] for step in steps]
        steps = [step for step in steps if step]
        missing = jobs.keys() - {m.name for step in steps for group in step for m in group}
        for name in sorted(missing):
            raise ModelError(
                f"{name} is never called in the forward pass, so it has no calibration input",
                hint=f"leave it out with --exclude '{name.split('.', 3)[-1]}', or use --method magnitude",
            )
        if self.method.order == "block":
            return [[group for step in steps for group in step]]
        return steps

    def _masks_so_far(self, index: int) -> dict[str, Tensor]:
        """Masks [out, in] that this stage may only shrink."""
        if self.masks is None:
            return {}
        block = self.masks.load_block(index)
        masks = {p.name: self.masks.weight(block, p) != 0 for p in self.masks.prunables(index)}
        return {name: mask for name, mask in masks.items() if not bool(mask.all())}

    def _propagate(
        self,
        index: int,
        block: torch.nn.Module,
        dense_block: torch.nn.Module | None,
        streams: Streams | None,
        masks: dict[str, Tensor] | None = None,
        passed: Container[int] = (),
    ) -> None:
        """Hidden states one block further; with `masks`, reconstruction (if asked for) in between.

        `passed`: windows for which the dense block has run already.
        """
        rebuilding = self.plan.stage.reconstruct and bool(masks)
        last = index == self.model.num_blocks - 1 and not head_jobs(self.plan)
        if streams is None or (last and not rebuilding):
            return
        self.context.progress.working(f"run {self.model.block_names[index]}")
        if dense_block is not None and streams.dense is not None:
            propagate(self.dense, index, dense_block, streams.dense, streams.args, streams.windows, passed)
            if rebuilding:
                self.context.progress.working(f"reconstruct {self.model.block_names[index]}")
                seed = self.context.plan.recipe.seed
                self.rebuilt.append(
                    rebuild(
                        self.model, index, block, masks or {}, streams.hidden, streams.dense, streams.args, seed
                    )  # fmt: skip
                )
        propagate(self.model, index, block, streams.hidden, streams.args, streams.windows)

    def _replay(self, index: int, streams: Streams | None) -> None:
        """A block finished by an earlier run: only the hidden states have to go through it again."""
        if streams is None:
            return
        block = self._pruned().load_block(index)
        dense_block = self.dense.load_block(index) if self._asymmetric else None
        self._propagate(index, block, dense_block, streams)

    def _finish(self, index: int, rows: list[dict[str, Any]], clock: Clock) -> None:
        rebuilt = [entry for entry in self.rebuilt if entry["block"] == index]
        self.context.finish(self._unit(index), {"rows": rows, "rebuilt": rebuilt})
        seconds, left = clock.tick()
        errors = [row["error_after"] for row in rows if row["error_after"] is not None]
        size = sum(row["shape"][0] * row["shape"][1] for row in rows)
        zeros = sum(row["zeros"] for row in rows)
        self.context.progress.block(
            BlockDone(
                stage="prune",
                block=index,
                blocks=self.model.num_blocks,
                name=self.model.block_names[index],
                error=sum(errors) / len(errors) if errors else None,
                sparsity=zeros / size if size else None,
                seconds=seconds,
                seconds_left=left,
            )
        )

    def _pruned(self) -> StreamedModel:
        """The model with the blocks of this stage that are finished."""
        so_far = OverlaySource(self.context.current(), self.folder)
        return self.context.open(so_far, self.context.dtype, untie=self.plan.stage.untie or self.context.untied)


def _check_finite(block: torch.nn.Module, name: str) -> None:
    for key, parameter in block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name}.{key} holds NaN or infinite values", hint="the checkpoint is damaged")
