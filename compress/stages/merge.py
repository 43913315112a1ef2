"""The merge stage: sums in float32, rounded once to the dtype of the checkpoint, with an account of what is lost."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel

from ...errors import CheckpointError
from ...finetune.spiel.config import SpielConfig
from ...finetune.spiel.layer import Linear
from .. import distributed
from ..adapters import Adapter, open_adapter
from ..jobs import MatrixJob
from ..needs import Needs, whole_needs
from ..plan import Plan, Planning, StagePlan
from ..stage_recipes.merge import MergeStage
from ..whole import kept_of, open_whole, write_whole
from .adapterchecks import check_adapter, masked_before
from .base import Context, StageReport


@dataclass(frozen=True)
class MergePlan(StagePlan):
    """`adapter`: opened, its headers checked."""

    stage: MergeStage
    jobs: tuple[MatrixJob, ...] = ()
    adapter: Adapter = field(compare=False, kw_only=True)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(path.name for path in self.adapter.folder.glob("adapter_*") if path.is_file()):
            digest.update((self.adapter.folder / name).read_bytes())
        return digest.hexdigest()


class Merge:
    """An adapter into the weights."""

    def plan(self, index: int, stage: MergeStage, planning: Planning) -> MergePlan:
        """CheckpointError for a folder without an adapter, or of another model; RecipeError if it undoes pruning."""
        adapter = open_adapter(stage.adapter)
        check_adapter(adapter, masked_before(index, planning), planning)
        return MergePlan(index, stage, adapter=adapter)

    def needs(self, plan: Plan, stage: MergePlan) -> Needs:
        return whole_needs(plan, stage, 0.0, 1, 1)

    def run(self, context: Context, stage: MergePlan) -> StageReport:
        started = time.monotonic()
        context.progress.working("open the model")
        model = open_whole(context)
        masks = kept_of(model)
        wrapped = _wrapped(model, stage)
        for layer in wrapped.modules():
            if isinstance(layer, Linear):
                layer.stored = context.plan.skeleton.dtype
        wrapped.merge_and_unload()
        fresh = getattr(model, "spiel_masks", {})
        for name, mask in fresh.items():
            rows = mask.to_bool()
            masks[name] = (rows if rows.shape == masks[name].shape else rows.t()).to(masks[name].device)
        folder = context.part_folder(stage)
        distributed.on_main(lambda: write_whole(context, model, masks, {}, folder))
        result: dict[str, Any] = {"adapter": stage.stage.adapter, "method": stage.adapter.kind, **_account(model)}
        return StageReport("merge", stage.index, time.monotonic() - started, result)


def _wrapped(model: Any, stage: MergePlan) -> Any:
    """The model with its adapter. CheckpointError for one that does not fit, in peft's words."""
    folder = str(stage.adapter.folder)
    try:
        config = PeftConfig.from_pretrained(folder)
        if isinstance(config, SpielConfig):
            config.check_base = stage.stage.check_base
        return PeftModel.from_pretrained(model, folder, config=config)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the adapter in {folder} cannot be put on the model: {reason}", hint="it was made for another model"
        ) from error


def _account(model: Any) -> dict[str, Any]:
    rows = [
        {"layer": layer, "entries": one.entries, "lost": one.lost, "error": one.error}
        for layer, reports in getattr(model, "spiel_reports", {}).items()
        for one in reports.values()
    ]
    entries = sum(row["entries"] for row in rows)
    return {
        "entries": entries,
        "lost": sum(row["lost"] for row in rows),
        "lost_share": sum(row["lost"] for row in rows) / entries if entries else 0.0,
        "merged_layers": rows,
    }
