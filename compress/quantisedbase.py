"""A model whose linear layers bitsandbytes holds in 4 or 8 bits, for stages that train something beside them.

It is read and quantised one decoder block at a time, and its matrices go back one at a time: the dense model is never
in memory, and no dense copy is written.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, RecipeError
from ..finetune.quantised import quantise
from .keymap import KeyMap
from .memory import release
from .needs import LOGITS, TRAINED_COPIES, Needs, Peak, block_bytes
from .plan import Plan, Planning, StagePlan
from .prunable import Prunable
from .quantizer import source_masks
from .saving import attach
from .stages.base import Context

BYTES = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0}  # per weight: codes, and a scale in 8 bits per block of 64
LINEAR = ("linear", "conv1d")


def check_base(kind: str, planning: Planning, targets: Iterable[Prunable]) -> None:
    """RecipeError, before a weight is read, where a base cannot be quantised."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"base_quant {kind} needs the package bitsandbytes", hint="pip install 'gossamer[train]', or leave it out"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise RecipeError(
            f"base_quant {kind} does not go with FSDP: what is sharded are the codes of a weight, not the weight",
            hint="launch without --use_fsdp; every process then holds the whole quantised base",
        )
    if not quantisable(targets):
        raise RecipeError(f"base_quant {kind}: the model has no linear layer in its blocks that could be quantised")


def quantisable(targets: Iterable[Prunable]) -> list[str]:
    """Names of the layers that are quantised. Fused experts, embeddings, norms and the head stay as they are."""
    return [target.name for target in targets if target.kind in LINEAR]


def open_quantised(context: Context, targets: Iterable[Prunable], kind: str, dtype: torch.dtype) -> Any:
    """The model after the stages finished so far, on the run's device: linear layers quantised, all else in `dtype`.

    With masks, as `open_whole` gives them: what they prune is exactly 0 in the quantised layers too.

    Raises:
        ModelError: a checkpoint tensor holds a quantised matrix beside one that is not.
    """
    source = context.current()
    model = context.open(source, dtype, untie=context.untied)
    keys = model.keys
    names = quantisable(targets)
    _check_groups(keys, names)

    def blocks() -> Iterator[nn.Module]:
        for i, prefix in enumerate(model.block_names):
            block = model.load_block(i)
            inside = [name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}.")]
            quantise(block, inside, kind, dtype)
            release()
            yield block

    masks = source_masks(source)
    whole = model.assembled(blocks())
    attach(whole, keys, masks, "dense")
    whole.is_loaded_in_8bit, whole.is_loaded_in_4bit = kind == "int8", kind != "int8"  # peft asks
    release()
    return whole


def _check_groups(keys: KeyMap, names: Sequence[str]) -> None:
    inside = {f"{name}.weight" for name in names}
    for name in inside:
        outside = sorted(set(keys.groups[name].targets) - inside)
        if outside:
            raise ModelError(
                f"{name} cannot be quantised: it lies in one tensor of the checkpoint with {outside[0]}",
                hint="fine-tune without --base-quant",
            )


def quantised_needs(
    plan: Plan,
    stage: StagePlan,
    targets: Sequence[Prunable],
    kind: str,
    dtype: torch.dtype,
    trained: float,
    tokens: int,
) -> Needs:
    """The quantised model, one dense block (while it is read), what is trained, and the logits of one micro-batch.

    `trained`: share of the weights of `targets` that have a gradient and moments. On disk: the trainer's checkpoint.
    """
    parameters = sum(math.prod(plan.source.meta(key).shape) for key in plan.source.keys())
    targeted = sum(target.size for target in targets)
    held = sum(target.size for target in targets if target.kind in LINEAR)
    entries = trained * targeted * 4
    weights = int(held * BYTES[kind] + (parameters - held) * dtype.itemsize)
    work = 2 * block_bytes(plan, dtype.itemsize) + int(TRAINED_COPIES * entries)
    logits = LOGITS * tokens * plan.skeleton.vocab_size * 4
    cause = f"{stage.stage.stage}: {parameters:,} parameters, {held:,} of them in {kind}, and what is trained"
    return Needs(Peak(weights + work + logits, cause), int(3 * entries))
