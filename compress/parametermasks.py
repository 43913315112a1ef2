"""Masks of a checkpoint as masks of a model's parameters, through the conversion that the weights go through."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.bitmask.dispatch import pack_bits
from .format import MatrixRecord, SourceMask, record_of
from .keymap import Group, KeyMap
from .unpack import run_operations

MIXED = "mixed"


def parameter_masks(
    model: Any, keys: KeyMap, masks: Mapping[str, SourceMask], without: Collection[str] = ()
) -> dict[str, SourceMask]:
    """Masks by checkpoint key -> masks by parameter name, through the conversion that the weights went through.

    `without`: parameters that are left out.
    """
    found: dict[str, SourceMask] = {}
    for group in keys.conversions():
        if any(key in masks for key in group.sources) and group.targets[0] not in without:
            found |= converted_masks(model, keys, group, masks) if group.converted else _same(group, masks)
    return found


def _same(group: Group, masks: Mapping[str, SourceMask]) -> dict[str, SourceMask]:
    return {group.targets[0]: masks[group.sources[0]]}


def converted_masks(model: Any, keys: KeyMap, group: Group, masks: Mapping[str, SourceMask]) -> dict[str, SourceMask]:
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
