"""The model as a whole, for stages that train it: an ordinary transformers model in, part files out.

model = open_whole(context)                       # the tensors as they stand, dense, with `model.gossamer_masks`
masks = kept_of(model, jobs)                      # parameter name -> True where kept
views = {job.name: view(model, job.prunable) for job in jobs}    # [out, in], writing to one writes to the model
write_whole(context, model, masks, patterns, folder)             # or write_matrices: some of it, one after the other
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..errors import CheckpointError, ModelError
from . import distributed
from .attached import ModelMasks, Outgoing, outgoing
from .checkpoint import assemble, atomic_write_text
from .convert import copy_companions
from .format import PackedTensor, SourceMask, dense_config, pack, summarise
from .jobs import MatrixJob
from .keymap import KeyMap
from .load import load
from .parametermasks import mask_of
from .prunable import Prunable, matrix_of, matrix_view, owner_of, stored_transposed
from .saving import attach
from .source import FolderSource
from .stages.base import Context
from .writer import write_part

PART_BYTES = 2**30  # tensors in memory at once while parts are written


def open_whole(context: Context, *, dtype: torch.dtype | str = torch.float32, dense: bool = False) -> Any:
    """The model after the stages finished so far, on the run's device, in training form: dense weights, explicit masks.

    `dense`: the source model instead, as a teacher. What it is read from lies below the run's scratch folder.
    """
    source = context.plan.source if dense else context.current()
    folder = context.scratch / ("source" if dense else "whole")
    distributed.on_main(lambda: _write_dense(context, source, folder, untied=context.untied and not dense))
    trust = context.plan.trust_remote_code
    model = load(folder, dtype=dtype, packed=False, attachments=False, trust_remote_code=trust)
    if not hasattr(model, "_gossamer"):  # no masks so far: what writing back needs to know
        attach(model, KeyMap(model, FolderSource(folder), model.dtype, torch.device("cpu")), {}, "dense")
    return model.to(context.plan.device)


def _write_dense(context: Context, source: Any, folder: Path, *, untied: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    assemble(source, folder, "dense")
    config = dense_config(context.plan.source.config, summarise(source.records()))
    if untied:
        config["tie_word_embeddings"] = False
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    copy_companions(context.plan.source.folder, folder)


def view(model: nn.Module, prunable: Prunable) -> Tensor:
    """The [out, in] view of a matrix: writing to it writes to the model."""
    return matrix_view(model, "", prunable)


def matrix_in(tensors: Mapping[str, Tensor], model: nn.Module, prunable: Prunable) -> Tensor:
    """The [out, in] view of a matrix among `tensors` (parameter name -> weights or mask, in the parameter's shape)."""
    return matrix_of(tensors[prunable.parameter], prunable, owner_of(model, "", prunable))


def kept_of(model: Any, jobs: Iterable[MatrixJob] = ()) -> dict[str, Tensor]:
    """Masks of the model, True = kept, by parameter name and in the parameter's shape and place; all True for the
    parameters of `jobs` that have none yet."""
    found = {name: model.gossamer_masks[name].to_bool() for name in model.gossamer_masks}
    for job in jobs:
        name = job.prunable.parameter
        if name not in found:
            found[name] = torch.ones(model.get_parameter(name).shape, dtype=torch.bool)
    return {name: mask.to(model.get_parameter(name).device) for name, mask in found.items()}


def write_whole(
    context: Context, model: Any, masks: Mapping[str, Tensor], patterns: Mapping[str, str], folder: Path
) -> None:
    """Part files of every tensor of the model, packed where it has a mask, in the dtypes of the source.

    `masks`: as from `kept_of`. `patterns`: parameter name -> what its mask promises ("0.5", "2:4", "mixed"); those left
    out keep the pattern they had. Pruned entries are written as +0.0: ModelError when one is anything but zero.
    """
    explicit = ModelMasks({name: _source_mask(context, model, name, masks, patterns) for name in masks})
    state = remove_tied_weights_from_state_dict({n: t.detach() for n, t in model.state_dict().items()}, model)
    _write(context, outgoing(model._gossamer, explicit, state), folder)


def write_matrices(
    context: Context, model: Any, matrices: Iterable[tuple[str, Tensor]], masks: Mapping[str, Tensor], folder: Path
) -> None:
    """The same of these parameters alone, which come one after the other; all others stay as they were.

    `masks` are looked at when their parameter has come. CheckpointError where one lies in one tensor of the checkpoint
    with a parameter that never comes.
    """

    def items() -> Iterator[Outgoing]:
        waiting: dict[str, Tensor] = {}
        for name, matrix in matrices:
            waiting[name] = matrix
            targets = model._gossamer.keys.groups[name].targets
            if all(target in waiting for target in targets):
                state = {target: waiting.pop(target) for target in targets}
                own = {name: _source_mask(context, model, name, masks, {}) for name in state if name in masks}
                yield from outgoing(model._gossamer, ModelMasks(own), state)
        if waiting:
            raise CheckpointError(f"{next(iter(waiting))} is only a part of a tensor of the checkpoint")

    _write(context, items(), folder)


def _write(context: Context, items: Iterable[Outgoing], folder: Path) -> None:
    known = set(context.plan.source.keys())
    dense: dict[str, Tensor] = {}
    packed: dict[str, PackedTensor] = {}
    part = size = 0
    for item in items:
        dtype = context.plan.source.meta(item.key).dtype if item.key in known else context.plan.skeleton.dtype
        tensor = item.tensor.to("cpu", dtype)
        if item.mask is None:
            dense[item.key] = tensor.contiguous()
        else:
            kept = item.mask.to_bool()
            _check_zeros(item.key, tensor, kept)
            tensor = tensor.masked_fill(~kept, 0.0).contiguous()
            packed[item.key] = pack(tensor, kept, pattern=item.mask.pattern, transposed=item.mask.record.transposed)
        size += tensor.nbytes
        if size >= PART_BYTES:
            write_part(folder / f"whole-{part:05d}.safetensors", dense, packed)
            dense, packed, size, part = {}, {}, 0, part + 1
    write_part(folder / f"whole-{part:05d}.safetensors", dense, packed)


def _source_mask(
    context: Context, model: Any, name: str, masks: Mapping[str, Tensor], patterns: Mapping[str, str]
) -> SourceMask:
    before = model.gossamer_masks.get(name)
    if name in patterns or before is None:
        transposed = _transposed(context, model, name) if before is None else before.record.transposed
        return mask_of(masks[name].cpu(), transposed=transposed, pattern=patterns[name])
    return mask_of(masks[name].cpu(), transposed=before.record.transposed, pattern=before.pattern)


def _transposed(context: Context, model: Any, name: str) -> bool:
    skeleton = context.plan.skeleton
    head = skeleton.head()
    every = [p for i in range(skeleton.num_blocks) for p in skeleton.prunables(i)] + ([head] if head else [])
    found = next(p for p in every if p.parameter == name)
    return stored_transposed(found, owner_of(model, "", found))


def _check_zeros(key: str, tensor: Tensor, kept: Tensor) -> None:
    revived = int(torch.count_nonzero(tensor)) - int(torch.count_nonzero(tensor[kept]))
    if revived:
        raise ModelError(
            f"{key}: {revived} pruned weights are not zero any more",
            hint="the stage did not keep its masks; nothing was written",
        )
