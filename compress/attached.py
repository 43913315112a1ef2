"""The masks of a model in memory: `model.gossamer_masks`, parameter name -> SourceMask in the parameter's own shape.

A mask lies beside the weights and does nothing by itself: training that wants to keep zeros multiplies by it, and
saving packs by it. `gossamer_masks[name].to_bool()` is True where a weight is kept; a mask may be replaced or removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CheckpointError
from .format import Scales, SourceMask
from .keymap import Group, KeyMap
from .parametermasks import MIXED, mask_of
from .placement import PackedMask


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


class ModelMasks(MutableMapping[str, SourceMask]):
    """Masks by parameter name. Those of packed modules are read from the modules: no second copy lies in memory."""

    def __init__(self, masks: Mapping[str, SourceMask], packed: Mapping[str, PackedMask] | None = None) -> None:
        self._masks: dict[str, SourceMask | PackedMask] = {**(packed or {}), **masks}

    def __getitem__(self, name: str) -> SourceMask:
        mask = self._masks[name]
        return mask.load() if isinstance(mask, PackedMask) else mask

    def __setitem__(self, name: str, mask: SourceMask) -> None:
        self._masks[name] = mask

    def __delitem__(self, name: str) -> None:
        del self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def __repr__(self) -> str:
        return f"ModelMasks({', '.join(self._masks)})"


def outgoing(attached: Attached, masks: Mapping[str, SourceMask], state: Mapping[str, Tensor]) -> Iterator[Outgoing]:
    """A model's `state` and `masks` (by parameter) as tensors of the checkpoint, conversion by conversion.

    Names that did not come from the checkpoint (modules added later) keep their own. CheckpointError for a mask that
    does not fit its parameter.
    """
    for name in masks:
        if name not in state:
            continue
        mask = masks[name]
        if tuple(state[name].shape) != mask.record.shape:
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
