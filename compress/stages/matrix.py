"""One matrix of a prune stage: solved by the rank that owns it, set on every rank, a row for the report."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ...pruning.base import LayerStats
from ...pruning.pattern import Pattern
from ...pruning.registry import get_method
from .. import distributed
from ..blocks import StreamedModel
from ..jobs import MatrixJob
from ..progress import Progress
from .solve import output_errors, solve


class MatrixPruner:
    """Prunes matrices of `model` with one method. `patterns`: matrix name -> the pattern it gets."""

    def __init__(self, method: Any, model: StreamedModel, patterns: dict[str, Pattern], progress: Progress) -> None:
        self.method, self.model, self.patterns, self.progress = method, model, patterns, progress

    def prune(
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
            self.progress.note(note)
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
            self.progress.note(
                f"{job.name}: {stats.tokens} calibration tokens for {columns} inputs, pruned by magnitude instead"
            )
            return get_method("magnitude"), "magnitude"
        return self.method, self.method.name
