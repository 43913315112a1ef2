"""A whole model that is pruned and trained in turns, with its masks: matrix by matrix, and safe on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...finetune.sharded import gathered
from ...pruning.imp import MIXED
from ...pruning.mask import Mask
from .. import distributed
from ..whole import kept_of, matrix_in, open_whole, view, write_whole
from ..wholestate import StateFile, is_sharded, load_tensors, whole_tensors, write_state
from .base import Context
from .targets import TargetPlan


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
