"""`--reconstruct`: after a block is pruned, its kept weights are trained towards the dense block's output."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...pruning.reconstruct import ReconstructOptions, reconstruct
from ..blocks import BlockArgs, Prunable, StreamedModel
from ..hidden import HiddenStore


class _Float32:
    """Hidden states of all windows as float32, read one at a time."""

    def __init__(self, store: HiddenStore, device: torch.device) -> None:
        self.store = store
        self.device = device

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, window: int) -> Tensor:
        return self.store.get(window).to(self.device, torch.float32)


def rebuild(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    masks: Mapping[str, Tensor],
    hidden: HiddenStore,
    dense_output: HiddenStore,
    args: BlockArgs,
    seed: int,
) -> dict[str, Any]:
    """Train the masked matrices of `block` in place; held-out mean squared error before and after.

    hidden: inputs of the pruned-so-far model; dense_output: what the dense block gives on the dense model's inputs.
    Trained in float32 and cast back; pruned entries stay zero.
    """
    chosen = [p for p in model.prunables(index) if p.name in masks]
    dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
    shaped = parameter_masks(model, index, block, chosen, masks)
    block.float()

    def forward(x: Tensor, window: int) -> Tensor:
        positional, named = as_float32(args.arguments(index, window, x))
        return args.returns[index].unpack(block(*positional, **named))

    with torch.enable_grad():
        done = reconstruct(
            block,
            forward,
            shaped,
            _Float32(hidden, model.device),  # type: ignore[arg-type]
            _Float32(dense_output, model.device),  # type: ignore[arg-type]
            ReconstructOptions(seed=seed),
        )
    for name, parameter in block.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
        if name in shaped:
            parameter.data.masked_fill_(~shaped[name], 0.0)
    for prunable in chosen:
        model.set_weight(block, prunable, model.weight(block, prunable))  # as the checkpoint will hold it
    return {"block": index, "before": done.before, "after": done.after, "steps": done.steps}


def parameter_masks(
    model: StreamedModel, index: int, block: nn.Module, chosen: Iterable[Prunable], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Masks [out, in] per matrix as masks of whole parameters (transposed layouts and fused experts included)."""
    ones = copy.deepcopy(block)
    root = model.block_names[index] + "."
    names = set()
    with torch.no_grad():
        for prunable in chosen:
            name = prunable.parameter.removeprefix(root)
            if name not in names:
                ones.get_parameter(name).fill_(1)
                names.add(name)
            model.set_weight(ones, prunable, masks[prunable.name].to(ones.get_parameter(name).dtype))
    return {name: ones.get_parameter(name) != 0 for name in sorted(names)}


def as_float32(value: Any) -> Any:
    """The same nest of tuples, lists and dicts with float tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: as_float32(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(as_float32(item) for item in value)
    return value
