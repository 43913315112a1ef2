"""The masks of a model in memory: `model.gossamer_masks`, parameter name -> SourceMask in the parameter's own shape.

A mask lies beside the weights and does nothing by itself: training that wants to keep zeros multiplies by it, and
saving packs by it. `gossamer_masks[name].to_bool()` is True where a weight is kept; a mask may be replaced or removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.bitmask.dispatch import pack_bits
from .format import MatrixRecord, Scales, SourceMask, record_of
from .keymap import Group, KeyMap
from .unpack import run_operations

MIXED = "mixed"


@dataclass(frozen=True)
class Attached:
    """What saving needs to know of the checkpoint that a model came from.

    `keys`: its keys and the conversion back. `form`: "sparse" or "dense". `patterns`: checkpoint key -> pattern of its
    mask. `scales`: checkpoint key -> scales, of matrices that had int8 values.
    """

    keys: KeyMap
    form: str
    patterns: dict[str, str]
    scales: Mapping[str, Scales] = field(default_factory=dict)


@dataclass(frozen=True)
class Outgoing:
    """A tensor as the checkpoint has it, with its mask if it has one."""

    key: str
    tensor: Tensor
    mask: SourceMask | None


def parameter_masks(model: Any, keys: KeyMap, masks: Mapping[str, SourceMask]) -> dict[str, SourceMask]:
    """Masks by checkpoint key -> masks by parameter name, through the conversion that the weights went through."""
    found: dict[str, SourceMask] = {}
    for group in keys.conversions():
        if any(key in masks for key in group.sources):
            found |= _converted(model, keys, group, masks) if group.converted else _same(group, masks)
    return found


def outgoing(attached: Attached, masks: Mapping[str, SourceMask], state: Mapping[str, Tensor]) -> Iterator[Outgoing]:
    """A model's `state` and `masks` (by parameter) as tensors of the checkpoint, conversion by conversion.

    Names that did not come from the checkpoint (modules added later) keep their own. CheckpointError for a mask that
    does not fit its parameter.
    """
    for name, mask in masks.items():
        if name in state and tuple(state[name].shape) != mask.record.shape:
            shape = list(state[name].shape)
            raise CheckpointError(f"the mask of {name} is {list(mask.record.shape)}, the parameter is {shape}")
    left = dict(state)
    for group in attached.keys.conversions():
        tensors = {name: left.pop(name) for name in group.targets if name in left}
        if len(tensors) == len(group.targets):
            yield from _reverted(attached, group, masks, tensors)
        else:
            left |= tensors
    for name, tensor in left.items():
        yield Outgoing(name, tensor, masks.get(name))


def _same(group: Group, masks: Mapping[str, SourceMask]) -> dict[str, SourceMask]:
    return {group.targets[0]: masks[group.sources[0]]}


def _converted(model: Any, keys: KeyMap, group: Group, masks: Mapping[str, SourceMask]) -> dict[str, SourceMask]:
    """Fused parameters: matrices without a mask are kept as a whole."""
    kept = {
        pattern: [masks[key].to_bool() if key in masks else torch.ones(keys.shape(key), dtype=torch.bool) for key in of]
        for pattern, of in group.patterns.items()
    }
    names = {masks[key].pattern for key in group.sources if key in masks}
    pattern = names.pop() if len(names) == 1 and all(key in masks for key in group.sources) else MIXED
    made = run_operations(group, kept, model)
    swapped = {name: _transposed(keys, name, masks) for name in made}
    return {name: mask_of(tensor, transposed=swapped[name], pattern=pattern) for name, tensor in made.items()}


def _transposed(keys: KeyMap, name: str, masks: Mapping[str, SourceMask]) -> bool:
    """Whether the last two dimensions of parameter `name` are [in, out], by a masked tensor that it was made from."""
    for piece in keys.pieces(name, transposed=False):
        if piece.key in masks:
            return masks[piece.key].record.transposed != piece.transposed
    return False


def mask_of(kept: Tensor, *, transposed: bool, pattern: str) -> SourceMask:
    """A SourceMask from a bool tensor of two or three dimensions. `transposed`: the last two are [in, out]."""
    layout = MatrixRecord(tuple(kept.shape), transposed, pattern, 0, "")
    bits = pack_bits(layout.as_rows(kept).contiguous())
    return SourceMask(bits, record_of(bits, layout.shape, transposed=transposed, pattern=pattern))


def _reverted(
    attached: Attached, group: Group, masks: Mapping[str, SourceMask], tensors: dict[str, Tensor]
) -> Iterator[Outgoing]:
    own = {name: masks[name] for name in tensors if name in masks}
    if not group.converted:
        name = group.targets[0]
        yield Outgoing(group.sources[0], tensors[name], own.get(name))
        return
    weights = attached.keys.revert(tensors)
    kept = attached.keys.revert(_kept(tensors, own)) if own else {}
    transposed = {
        piece.key: piece.transposed
        for name, mask in own.items()
        for piece in attached.keys.pieces(name, transposed=mask.record.transposed)
    }
    for key, tensor in weights.items():
        mask = None
        if key in transposed and (key in attached.patterns or not bool(kept[key].all())):
            pattern = attached.patterns.get(key, MIXED)
            mask = mask_of(kept[key], transposed=transposed[key], pattern=pattern)
        yield Outgoing(key, tensor, mask)


def _kept(tensors: Mapping[str, Tensor], masks: Mapping[str, SourceMask]) -> dict[str, Tensor]:
    return {
        name: masks[name].to_bool() if name in masks else torch.ones(tensor.shape, dtype=torch.bool)
        for name, tensor in tensors.items()
    }
