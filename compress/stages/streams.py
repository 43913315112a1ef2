"""Calibration windows on their way through the blocks: of the model as pruned so far, and of the dense model."""

from __future__ import annotations

from dataclasses import dataclass

from .. import distributed
from ..blocks import BlockArgs, StreamedModel
from ..evaluate import capture
from ..hidden import HiddenStore
from ..plan import PrunePlan
from .base import Context


@dataclass
class Streams:
    """Hidden states of every window: `hidden` of the model as pruned so far, `dense` of the dense one where needed."""

    windows: int
    args: BlockArgs
    hidden: HiddenStore
    dense: HiddenStore | None

    def close(self) -> None:
        """Forget both; their files go too."""
        self.hidden.close()
        if self.dense is not None:
            self.dense.close()


def open_streams(context: Context, plan: PrunePlan, model: StreamedModel, *, dense: bool) -> Streams | None:
    """The windows of the plan in front of the first block; None where the stage reads none."""
    if plan.windows is None:
        return None
    total = context.plan.machine.max_memory_bytes // 2
    share = total // 2 if dense else total
    hidden = HiddenStore(context.scratch / f"hidden-{distributed.rank()}", share)
    args = capture(model, plan.windows, hidden)
    twin = None
    if dense:
        twin = HiddenStore(context.scratch / f"dense-{distributed.rank()}", share)
        with distributed.agreed():
            for window in distributed.followed(len(plan.windows)):
                twin.put(window, hidden.get(window))
    return Streams(len(plan.windows), args, hidden, twin)
