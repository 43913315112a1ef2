"""Which checkpoint keys hold which parameter, and the way there and back, both by transformers' own conversion.

transformers may rename, stack, concatenate, split or transpose tensors while loading (per-expert matrices become one
3-D parameter). A Group is one such conversion: the source keys that it reads and the parameters that it makes. Masks
go back through the very same conversion as 0/1 tensors, so a mask always ends up in its source tensor's orientation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..errors import ModelError
from .hf_private import (
    LoadStateDictConfig,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    get_model_conversion_mapping,
    quiet_loading,
    rename_source_key,
    revert_weight_conversion,
)


class Meta(Protocol):
    """What a header says about one tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Tensors(Protocol):
    """The part of a TensorSource that loading needs."""

    def keys(self) -> list[str]: ...

    def meta(self, key: str) -> Any: ...

    def read(self, key: str) -> torch.Tensor: ...


@dataclass
class Group:
    """One conversion: `sources` (checkpoint keys) <-> `targets` (parameter or buffer names).

    `converter`: transformers' own, or None when a tensor is only renamed. `patterns`: its source patterns, each with
    the keys that it matched, in the order in which the loader collects them.
    """

    targets: list[str]
    sources: list[str] = field(default_factory=list)
    converter: Any = None
    patterns: dict[str, list[str]] = field(default_factory=dict)

    @property
    def converted(self) -> bool:
        return self.converter is not None


@dataclass(frozen=True)
class Piece:
    """One source tensor of a parameter.

    `transposed`: the matrix rows of the source tensor are columns of the [out, in] view.
    `experts`: which experts of a fused parameter lie in it; None for a plain matrix.
    """

    key: str
    transposed: bool
    experts: tuple[int, ...] | None


class KeyMap:
    """Checkpoint keys <-> parameters of a meta skeleton; loads into it, and reverses.

    `groups`: target name -> Group. `unmapped`: source keys that the model does not use (old rotary buffers, ...).
    """

    def __init__(self, model: Any, source: Tensors, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model
        self._source = source
        self._dtype = dtype
        self._device = device
        self._conversions = get_model_conversion_mapping(model)
        self._pieces: dict[tuple[str, ...], list[tuple[int, bool, tuple[int, ...]]]] = {}
        self.groups: dict[str, Group] = {}
        self.unmapped: list[str] = []
        # As they are now: sparse modules may take the place of parameters later.
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._assign(source.keys())
        self._used = [c for c in self._conversions if c.was_used()]
        self._check_shapes()

    def _assign(self, keys: Iterable[str]) -> None:
        """The name matching of transformers' loader, without the tensors."""
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state = self._model.state_dict()
        prefix = self._model.base_model_prefix
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
            if name not in state:
                self.unmapped.append(key)
                continue
            targets = [name]
            if pattern is not None:
                first, *others = by_pattern[pattern].target_patterns
                targets += [name.replace(first, other, 1) for other in others]
            group = self.groups.get(name)
            if group is None:
                group = Group(targets, converter=None if pattern is None else by_pattern[pattern])
                self.groups.update(dict.fromkeys(targets, group))
            elif pattern is None:
                self.unmapped.append(key)  # a second name for the same parameter: from_pretrained ignores it too
                continue
            group.sources.append(key)
            if pattern is not None:
                group.patterns.setdefault(pattern, []).append(key)

    def _check_shapes(self) -> None:
        state = self._model.state_dict()
        for name, group in self.groups.items():
            if group.converted or name not in state:
                continue
            meta = self._source.meta(group.sources[0])
            if tuple(meta.shape) != tuple(state[name].shape):
                raise ModelError(
                    f"tensor {group.sources[0]} has shape {tuple(meta.shape)}, config.json asks for "
                    f"{tuple(state[name].shape)}",
                    hint="config.json and weights belong to different models",
                )

    def conversions(self) -> list[Group]:
        """Every group once."""
        return list({id(group): group for group in self.groups.values()}.values())

    @property
    def used(self) -> list[Any]:
        """transformers' transforms that matched something: what saving has to reverse."""
        return self._used

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a checkpoint tensor."""
        return tuple(self._source.meta(key).shape)

    def missing(self) -> list[str]:
        """Parameters that no checkpoint key fills (tied ones included)."""
        return [name for name, _ in self._model.named_parameters(remove_duplicate=False) if name not in self.groups]

    def sources(self, prefix: str) -> list[str]:
        """Source keys of every target whose name starts with `prefix`, in natural order."""
        found = {key for name, group in self.groups.items() if name.startswith(prefix) for key in group.sources}
        return sorted(found, key=dot_natural_key)

    def load(self, keys: Iterable[str]) -> set[str]:
        """Read `keys` and put what they make into the skeleton, in place; returns the names still missing."""
        lazy = {key: _Lazy(self._source, key) for key in keys}
        config = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            device_map={"": self._device},
            weight_mapping=self._conversions,
        )
        with quiet_loading():
            info, _ = convert_and_load_state_dict_in_model(model=self._model, state_dict=lazy, load_config=config)
        if info.conversion_errors:
            name, text = next(iter(info.conversion_errors.items()))
            raise ModelError(f"transformers could not convert the tensors of {name}: {text.strip().splitlines()[-1]}")
        if info.mismatched_keys:
            name, found, expected = sorted(info.mismatched_keys)[0]
            raise ModelError(f"{name} has shape {tuple(found)} in the checkpoint, {tuple(expected)} in config.json")
        return set(info.missing_keys)

    def revert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters (whole groups) -> source keys, by the reversed conversion. Any dtype; no arithmetic is done."""
        groups = {id(self.groups[name]): self.groups[name] for name in tensors}
        expected = {key for group in groups.values() for key in group.sources}
        self._model._weight_conversions = self._used or None
        if self._used:
            made = revert_weight_conversion(self._model, tensors)
        else:
            made = dict(tensors)
        found = {self._source_name(name, expected): tensor for name, tensor in made.items()}
        if set(found) != expected:
            odd = sorted(set(found) ^ expected)[0]
            raise ModelError(f"transformers' conversion of {next(iter(tensors))} cannot be reversed: {odd} differs")
        return found

    def _source_name(self, name: str, expected: set[str]) -> str:
        """`name`, or the same with the base model's prefix added or dropped as the checkpoint has it."""
        prefix = f"{self._model.base_model_prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in expected:
                return candidate
        return name

    def pieces(self, name: str, *, transposed: bool) -> list[Piece]:
        """Where parameter `name` lies in the checkpoint. `transposed`: it is stored as [in, out] in the model."""
        group = self.groups[name]
        shape = self._shapes[name]
        if not group.converted:
            experts = tuple(range(shape[0])) if len(shape) == 3 else None
            return [Piece(group.sources[0], transposed, experts)]
        kind = (*(_digits_out(key) for key in group.targets), str(shape), str(len(group.sources)))
        if kind not in self._pieces:
            self._pieces[kind] = self._probe(group, name)
        fused = len(shape) == 3
        return [
            Piece(group.sources[i], transposed != swapped, experts if fused else None)
            for i, swapped, experts in self._pieces[kind]
        ]

    def _probe(self, group: Group, name: str) -> list[tuple[int, bool, tuple[int, ...]]]:
        """Send row numbers through the reversed conversion: (source index, axes swapped, experts) per source.

        Thin tensors (last axis 1) are tried first, so that probing a large mixture costs no memory.
        """
        try:
            made = self._revert_row_numbers(group, name, thin=True)
        except (ModelError, RuntimeError, ValueError, IndexError):
            made = self._revert_row_numbers(group, name, thin=False)
        rows = self._shapes[name][-2]
        result = []
        for i, key in enumerate(group.sources):
            numbers = made[key]
            if int(numbers.max()) < 0:
                continue
            swapped = numbers.shape[-1] > 1 and bool((numbers != numbers[..., :1]).any())
            result.append((i, swapped, tuple(int(e) for e in torch.unique(numbers // rows))))
        return result

    def _revert_row_numbers(self, group: Group, name: str, *, thin: bool) -> dict[str, torch.Tensor]:
        tensors = {}
        for target in group.targets:
            shape = self._shapes[target]
            lead = math.prod(shape[:-1])
            numbers = torch.arange(lead) if target == name else torch.full((lead,), -1)
            tensors[target] = numbers.view(*shape[:-1], 1).expand(*shape[:-1], 1 if thin else shape[-1])
        return self.revert(tensors)


class _Lazy:
    """Reads its tensor when transformers' loader asks for `[...]`, and keeps no reference."""

    def __init__(self, source: Tensors, key: str) -> None:
        self._source, self._key = source, key

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._source.read(self._key)


def _digits_out(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
