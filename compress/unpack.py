"""Packed matrices into transformers' loader: the operation that expands them, and the converters that collect them.

transformers loads a parameter by a converter: patterns that collect checkpoint tensors, operations that turn them into
the parameter. Packed matrices come as `K_bitmask` and `K_values`: both are collected for the parameter that K belongs
to and expanded to K; then the model's own operations (stacking experts, ...) follow as if K had been stored dense. A
matrix that is a parameter by itself is handed to placement.py before, a stack of experts after that: it may keep them
packed.

With int8 values comes `K_scales`. The loader casts it like a weight, so what it collects tells the dtype that is wanted
and nothing else; the scales themselves were read before, from the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from ..errors import CheckpointError
from .format import BITMASK, SCALES, VALUES, PackedTensor, Scales, SourceMask, stored_names, unpack
from .hf_private import WeightConverter, WeightRenaming, rename_source_key
from .keymap import Group, KeyMap

if TYPE_CHECKING:
    from .placement import Placement


def packed_conversions(
    conversions: Sequence[Any],
    keys: KeyMap,
    masks: Mapping[str, SourceMask],
    scales: Mapping[str, Scales],
    placement: Placement | None = None,
) -> list[Any]:
    """The model's `conversions`, able to collect packed matrices, and one for parameters that have no conversion.

    Matrices that `placement` takes stay packed; the others are expanded.
    """
    ends = [BITMASK, VALUES, *([SCALES] if scales else [])]
    made = [Unpack(keys, masks, {}, entry, scales=scales, placement=placement) for entry in conversions]
    rewritten = [_collecting(entry, ends, operation) for entry, operation in zip(conversions, made, strict=True)]
    return [*rewritten, WeightConverter(ends, "", [Unpack(keys, masks, {}, scales=scales, placement=placement)])]


def check_names(
    conversions: Sequence[Any],
    keys: KeyMap,
    masks: Mapping[str, SourceMask],
    model: Any,
    scales: Mapping[str, Scales],
) -> None:
    """All tensors of every packed matrix must find the parameter that the matrix belongs to, or it would stay random.

    CheckpointError naming the first that does not. `conversions` keep a state: give a copy.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    for group in keys.conversions():
        for key in group.sources:
            for stored in _stored(key, masks, scales):
                name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
                if name != group.targets[0] or pattern is None:
                    raise CheckpointError(
                        f"tensor {key} is packed, and transformers would look for it under {name}",
                        hint="gossamer convert --to dense makes a checkpoint that loads",
                    )


def _stored(key: str, masks: Mapping[str, SourceMask], scales: Mapping[str, Scales]) -> list[str]:
    if key not in masks:
        return []
    names = stored_names(key, masks[key].record)
    return [*names, key + SCALES] if key in scales else names


def check_conversions(keys: KeyMap, model: Any) -> None:
    """Run every conversion on shapes alone. CheckpointError where a part, say one expert, is missing or misshapen."""
    state = model.state_dict()
    for group in keys.conversions():
        if not group.converted:
            continue
        shapes = {pattern: [_shape_only(keys.shape(key)) for key in of] for pattern, of in group.patterns.items()}
        try:
            made = run_operations(group, shapes, model)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise _unfit(group) from error
        for name, tensor in made.items():
            if name in state and tensor.shape != state[name].shape:
                raise _unfit(group)


def _shape_only(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def _unfit(group: Group) -> CheckpointError:
    return CheckpointError(
        f"{len(group.sources)} tensors ({group.sources[0]}, ...) do not make up the parameter {group.targets[0]}",
        hint="the checkpoint is incomplete, or belongs to another config.json",
    )


def run_operations(group: Group, tensors: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Parameter name -> what the group's own operations make of {pattern: tensors}. Any dtype; no arithmetic."""
    converter = group.converter.copy(
        list(group.converter._original_source_patterns),
        list(group.converter._original_target_patterns),
        operations=list(group.converter.operations),
    )
    for pattern, members in tensors.items():
        for key, tensor in zip(group.patterns[pattern], members, strict=True):
            converter.add_tensor(group.targets[0], key, pattern, tensor)
    made = converter.convert(group.targets[0], model=model, config=model.config)
    return {name: _one(value) for name, value in made.items()}


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _parameters(patterns: Iterable[str], name: str) -> dict[str, str]:
    """Target pattern -> full parameter name, as transformers completes them from the first parameter's `name`."""
    listed = list(patterns)
    for pattern in listed:
        if pattern in name:
            before, _, after = name.partition(pattern)
            return {other: before + other + after for other in listed}
    return {other: other for other in listed}


class Unpack(ConversionOps):
    """Expands collected tensors and applies the operations that the converter had.

    `names`: pattern of the converter -> patterns under which K, K_bitmask, K_values (and K_scales) are collected; {}
    when there was no converter. Float values have been cast by the loader, which is what casting the dense matrix would
    give. `scales`: of the matrices with int8 values.
    """

    supports_many_to_many = True

    def __init__(
        self,
        keys: KeyMap,
        masks: Mapping[str, SourceMask],
        names: dict[str, tuple[str, ...]],
        converter: Any = None,
        *,
        scales: Mapping[str, Scales],
        placement: Placement | None = None,
    ) -> None:
        self._keys = keys
        self._masks = masks
        self._names = names
        self._converter = converter
        self._scales = scales
        self._placement = placement

    def __deepcopy__(self, memo: dict[int, Any]) -> Unpack:
        return self  # the loader copies a converter for every parameter; masks are not to be copied along

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str = "",
        **rest: Any,
    ) -> dict[str, Any]:
        group = self._keys.groups[full_layer_name]
        if self._converter is None:
            like = input_dict.pop(SCALES, [None])[0]
            values = input_dict.pop(VALUES)[0]
            return {full_layer_name: self._single(full_layer_name, group.sources[0], values, like)}
        made: dict[str, Any] = {
            pattern: self._members(group.patterns[pattern], input_dict, self._names[pattern])
            for pattern in self._converter.source_patterns
            if pattern in group.patterns
        }
        for operation in self._converter.operations:
            made = operation.convert(
                made,
                source_patterns=self._converter.source_patterns,
                target_patterns=self._converter.target_patterns,
                full_layer_name=full_layer_name,
                **rest,
            )
        if self._placement is not None:
            names = _parameters(made, full_layer_name)
            whole = {names[pattern]: _one(value) for pattern, value in made.items()}
            taken = self._placement.take_stacks(group, whole, self._keys, self._masks)
            made = {pattern: taken[name] for pattern, name in names.items()}
        return made

    def _members(self, keys: list[str], collected: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:
        """The dense tensors of `keys`, in order; plain and packed ones may be mixed."""
        plain, _, values, *scales = (iter(collected.pop(name, [])) for name in names)
        return [
            self._expand(key, next(values), next(scales[0]) if key in self._scales else None)
            if key in self._masks
            else next(plain)
            for key in keys
        ]

    def _single(self, name: str, key: str, values: Tensor, like: Tensor | None) -> Tensor:
        kept = None
        if self._placement is not None:
            scales = self._scales[key] if like is not None and like.dtype is self._scales[key].dtype else None
            if like is None or scales is not None:
                kept = self._placement.take(name, values, self._masks[key], scales)
        return self._expand(key, values, like) if kept is None else kept

    def _expand(self, key: str, values: Tensor, like: Tensor | None) -> Tensor:
        """`like`: the scales as the loader cast them."""
        mask = self._masks[key]
        if like is not None:
            known = self._scales[key]
            record = replace(mask.record, int8=known.dtype)
            dense = unpack(PackedTensor(mask.bits, values.cpu(), record, known.scales), key)
            return dense.to(values.device, like.dtype)
        return unpack(PackedTensor(mask.bits, values.cpu(), mask.record), key).to(values.device)

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("packed weights are saved by compress/saving.py")


def _collecting(entry: Any, ends: list[str], operation: Unpack) -> Any:
    if not isinstance(entry, WeightConverter):
        return entry
    sources = [source + end for source in entry._original_source_patterns for end in ("", *ends)]
    copy = entry.copy(sources, list(entry._original_target_patterns), operations=[operation])
    width = len(ends) + 1
    for i, pattern in enumerate(entry.source_patterns):
        operation._names[pattern] = tuple(copy.source_patterns[width * i : width * (i + 1)])
    return copy
