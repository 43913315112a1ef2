"""What a stage needs while it runs, from shapes alone: the parts that estimates of all stages are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .plan import Plan, StagePlan, evaluation_dtype

LOGITS = 4  # float32 tensors [window, vocabulary] alive at once while two models are compared
TRAINED_COPIES = 4  # of every trained parameter in float32: weight, gradient, two moments


@dataclass(frozen=True)
class Peak:
    """Bytes, and what they are for."""

    bytes: int
    cause: str


@dataclass(frozen=True)
class Needs:
    """`peak`: resident memory beyond what the process holds. `disk`: bytes of files beside those of its parts."""

    peak: Peak
    disk: int = 0


def compute_dtype(plan: Plan) -> torch.dtype:
    """In which a layerwise stage works."""
    name = plan.machine.dtype
    return plan.skeleton.dtype if name == "auto" else getattr(torch, name)


def hidden_bytes(plan: Plan, stage: StagePlan, dtype: torch.dtype, models: int) -> int:
    """Hidden states of all windows of `stage`, for as many models as run beside each other."""
    if stage.windows is None:
        return 0
    return models * stage.windows.numel() * width(plan) * dtype.itemsize


def held(plan: Plan, states: int) -> int:
    """What stays in memory of `states` bytes of hidden states; the rest is spilled."""
    return min(states, plan.machine.max_memory_bytes // 2)


def width(plan: Plan) -> int:
    return int(plan.skeleton.config.get_text_config().hidden_size)


def block_bytes(plan: Plan, itemsize: int) -> int:
    """The largest decoder block."""
    model = plan.skeleton
    sizes = [
        sum(math.prod(plan.source.meta(key).shape) for key in model.block_keys(i)) for i in range(model.num_blocks)
    ]
    return max(sizes) * itemsize


def outer_bytes(plan: Plan, itemsize: int) -> int:
    """Everything outside the decoder blocks."""
    return sum(math.prod(plan.source.meta(key).shape) for key in plan.skeleton.outer_keys()) * itemsize


def evaluation_needs(plan: Plan, stage: StagePlan) -> Needs:
    """Two models compared block by block on the windows of `stage`."""
    dtype = evaluation_dtype(plan.machine)
    assert stage.windows is not None
    length = stage.windows.shape[1]
    logits = LOGITS * length * plan.skeleton.vocab_size * 4
    cause = f"evaluation: logits of {length} tokens x {plan.skeleton.vocab_size}"
    head = Peak(outer_bytes(plan, dtype.itemsize) + logits, cause)
    block = Peak(2 * block_bytes(plan, dtype.itemsize), "evaluation: one decoder block")
    largest = max(head, block, key=lambda found: found.bytes)
    states = hidden_bytes(plan, stage, dtype, 2)
    return Needs(Peak(largest.bytes + held(plan, states), largest.cause), states - held(plan, states))


def whole_needs(plan: Plan, stage: StagePlan, trained: float = 1.0, tokens: int = 0, models: int = 1) -> Needs:
    """The whole model in float32 while it is trained.

    `trained`: share of the parameters that have a gradient and moments. `tokens`: of one step, for its logits.
    `models`: copies beside each other (a teacher, a soup). On disk: a dense copy, and the trainer's checkpoint with its
    optimizer state.
    """
    parameters = sum(math.prod(plan.source.meta(key).shape) for key in plan.source.keys())
    training = int(parameters * 4 * (models + (TRAINED_COPIES - 1) * trained))
    logits = LOGITS * tokens * plan.skeleton.vocab_size * 4
    disk = plan.source.nbytes() + int(parameters * 4 * (1 + 2 * trained))
    cause = f"{stage.stage.stage}: {models} x {parameters:,} parameters and their moments"
    return Needs(Peak(training + logits, cause), disk)
