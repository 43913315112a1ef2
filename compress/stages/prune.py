"""One-shot pruning, streamed: one decoder block in memory at a time, its result durable before the next one starts."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from ...pruning.base import LayerStats
from ...pruning.pattern import Pattern
from ...pruning.registry import get_method
from .. import distributed, memory
from ..blocks import BlockArgs, Prunable, StreamedModel
from ..calibration import accumulator_for, collect
from ..evaluate import capture, propagate
from ..failpoint import failpoint
from ..hidden import HiddenStore
from ..jobs import MatrixJob
from ..masks import MaskSource
from ..plan import PrunePlan
from ..progress import BlockDone
from ..residual import Places, residual_places
from ..source import OverlaySource
from ..timing import Clock
from .base import Context, StageReport
from .budget import budgets
from .parts import head_path, part_path, write_exported
from .rebuild import rebuild
from .solve import output_errors, solve


@dataclass
class _Streams:
    """Calibration state: hidden states of the model as pruned so far, and of the dense model when targets need them."""

    windows: int
    args: BlockArgs
    hidden: HiddenStore
    dense: HiddenStore | None

    def close(self) -> None:
        self.hidden.close()
        if self.dense is not None:
            self.dense.close()


class PruneRun:
    """Runs one prune stage; `run` returns its report."""

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
        self.patterns: dict[str, Pattern] = {}
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
        self.patterns = budgets(self.context, self.plan, self.model)
        rows: list[dict[str, Any]] = []
        blocks = self.model.num_blocks
        self.context.progress.stage(f"prune with {self.method.name}", blocks)
        streams = self._open_streams() if self.plan.windows is not None else None
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
            rows += self._head(streams)
        finally:
            if streams is not None:
                streams.close()
        return StageReport(
            "prune", self.plan.index, time.monotonic() - started, {"layers": rows, "rebuilt": self.rebuilt}
        )

    def _unit(self, index: int) -> str:
        return f"{self.plan.name}/block-{index:05d}"

    def _open_streams(self) -> _Streams:
        assert self.plan.windows is not None
        total = self.context.plan.machine.max_memory_bytes // 2
        share = total // 2 if self._asymmetric else total
        scratch = self.context.scratch
        hidden = HiddenStore(scratch / f"hidden-{distributed.rank()}", share)
        args = capture(self.model, self.plan.windows, hidden)
        dense = None
        if self._asymmetric:
            dense = HiddenStore(scratch / f"dense-{distributed.rank()}", share)
            with distributed.agreed():
                for window in distributed.followed(len(self.plan.windows)):
                    dense.put(window, hidden.get(window))
        return _Streams(len(self.plan.windows), args, hidden, dense)

    def _block(self, index: int, streams: _Streams | None) -> list[dict[str, Any]]:
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
                row, mask = self._matrix(block, jobs[member.name], stats.pop(member.name, None), keep, position)
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
            text = str(self.patterns[job.name])
            shrunk = job.name in keep and text.startswith("block")
            for key in job.keys:
                found.setdefault(key, set()).add("mixed" if shrunk else text)
        return {key: texts.pop() if len(texts) == 1 else "mixed" for key, texts in found.items()}

    def _places(self, index: int, block: torch.nn.Module, streams: _Streams | None) -> Places:
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
        self, index: int, block: torch.nn.Module, streams: _Streams | None, jobs: dict[str, MatrixJob]
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

    def _matrix(
        self,
        block: torch.nn.Module,
        job: MatrixJob,
        stats: LayerStats | None,
        keep: dict[str, Tensor],
        position: int,
    ) -> tuple[dict[str, Any], Tensor]:
        """Prune one matrix on the rank that owns it and set the result on every rank."""
        started = time.monotonic()
        weight = self.model.weight(block, job.prunable)
        pattern = self.patterns[job.name]
        owner = position % distributed.world()
        method, name = self._method_for(job, stats)
        new = torch.empty(weight.shape, device=weight.device)
        bits = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        notes: list[str] = []
        aim = weight
        with distributed.agreed():
            if owner == distributed.rank():
                new, found, aim = solve(method, weight, stats, pattern, keep.get(job.name), notes.append)
                new, bits = new.contiguous(), found.to(torch.uint8)
                del found
        distributed.broadcast_([new, bits], owner)
        mask = bits.bool()
        self.model.set_weight(block, job.prunable, new.masked_fill_(~mask, 0))
        new = self.model.weight(block, job.prunable)
        errors: list[float | None] = []
        if owner == distributed.rank():
            errors = output_errors(aim, [weight.masked_fill(~mask, 0), new], stats)
        (before, after), notes = distributed.from_rank((errors, notes), owner)
        for note in notes:
            self.context.progress.note(note)
        row = {
            "name": job.name,
            "shape": list(job.prunable.shape),
            "pattern": str(pattern),
            "method": name,
            "zeros": int((~mask).sum()),
            "sparsity": round(float((~mask).float().mean()), 6),
            "tokens": None if stats is None else stats.tokens,
            "error_before": before,
            "error_after": after,
            "seconds": round(time.monotonic() - started, 3),
        }
        return row, mask

    def _method_for(self, job: MatrixJob, stats: LayerStats | None) -> tuple[Any, str]:
        """The stage's method, or magnitude for an expert that saw too few tokens to say anything."""
        columns = job.prunable.shape[1]
        if stats is not None and job.prunable.kind == "expert" and stats.tokens < columns and self.method.needs:
            self.context.progress.note(
                f"{job.name}: {stats.tokens} calibration tokens for {columns} inputs, pruned by magnitude instead"
            )
            return get_method("magnitude"), "magnitude"
        return self.method, self.method.name

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
        streams: _Streams | None,
        masks: dict[str, Tensor] | None = None,
        passed: Container[int] = (),
    ) -> None:
        """Hidden states one block further; with `masks`, reconstruction (if asked for) in between.

        `passed`: windows for which the dense block has run already.
        """
        rebuilding = self.plan.stage.reconstruct and bool(masks)
        last = index == self.model.num_blocks - 1 and not self._head_jobs()
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

    def _replay(self, index: int, streams: _Streams | None) -> None:
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

    def _head_jobs(self) -> list[MatrixJob]:
        return [job for job in self.plan.jobs if job.prunable.kind == "head"]

    def _pruned(self) -> StreamedModel:
        """The model with the blocks of this stage that are finished."""
        so_far = OverlaySource(self.context.current(), self.folder)
        return self.context.open(so_far, self.context.dtype, untie=self.plan.stage.untie or self.context.untied)

    def _head(self, streams: _Streams | None) -> list[dict[str, Any]]:
        """Prune the output matrix, or give it its own weight, when the stage asks for either."""
        jobs = self._head_jobs()
        # Whether the checkpoint ties them is asked of the plan's skeleton: this stage's own model is untied already.
        untying = self.plan.stage.untie and not self.context.untied and self.context.plan.skeleton.head_is_tied
        if not jobs and not untying:
            return []
        unit = f"{self.plan.name}/head"
        done = self.context.journal.done(unit)
        if done is not None:
            return done["rows"]
        head = self.model.load_head()
        rows, mask = [], None
        if jobs:
            stats = None if streams is None else head_stats(self.model, jobs[0], head, streams, self.needs)
            row, mask = self._matrix(head, jobs[0], stats, {}, 0)
            rows.append(row)
        promise = str(self.patterns[jobs[0].name]) if jobs else ""
        distributed.on_main(lambda: self._write_head(head, mask, promise))
        self.context.finish(unit, {"rows": rows})
        return rows

    def _write_head(self, head: torch.nn.Module, mask: Tensor | None, promise: str) -> None:
        exported = self.model.export_head(head, mask)
        write_exported(head_path(self.folder), exported, {item.key: promise for item in exported})


def head_stats(
    model: StreamedModel, job: MatrixJob, head: torch.nn.Module, streams: _Streams, needs: frozenset[str]
) -> LayerStats:
    """Statistics of the output matrix: its input is the final norm's output, its target its own dense output."""
    accumulator = accumulator_for(
        model, head, None, [job.prunable], needs - {"target"}, streams.windows, streams.args.length, {}
    )
    with model.outer():
        for window in distributed.turns(streams.windows):
            found = None
            if window is not None:
                found = {job.name: model.head_input(streams.hidden.get(window), streams.args, window)}
            for seen in distributed.in_turn(found, model.device):
                accumulator.add(seen[job.name], None)
    return accumulator.finish()[job.name]


def _check_finite(block: torch.nn.Module, name: str) -> None:
    for key, parameter in block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name}.{key} holds NaN or infinite values", hint="the checkpoint is damaged")
