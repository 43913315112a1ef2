"""Weights in and out of the skeleton: one part at a time, and never more than asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .keymap import KeyMap

_State = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


class Materialiser:
    """Loads parts of a meta skeleton. `blocks`: the list that stays empty while the outer modules are in memory."""

    def __init__(self, model: Any, keys: KeyMap, blocks_path: str, device: torch.device, *, untie: bool) -> None:
        self._model = model
        self._keys = keys
        self._inside = f"{blocks_path}."
        self._blocks = model.get_submodule(blocks_path)
        self._device = device
        self._untie = untie
        self._depth = 0
        self._kept: _State = []
        _move_buffers([module for module, _, _ in _snapshot(model, skip=self._blocks)], device)

    def part(self, path: str, keys: Iterable[str]) -> nn.Module:
        """A copy of the skeleton's module `path` with the tensors of `keys`; the skeleton is empty again afterwards."""
        module = self._model.get_submodule(path)
        kept = _snapshot(module)
        try:
            self._keys.load(keys)
            shared = [*module.parameters(), *module.buffers()]
            clone = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
        finally:
            _restore(kept)
        clone.__dict__.pop("forward", None)  # a stub, when a block is loaded in the middle of a capture
        empty = next((name for name, p in clone.named_parameters() if p.is_meta), None)
        if empty is not None:
            raise ModelError(f"the checkpoint has no tensor for {path}.{empty}")
        _move_buffers(clone.modules(), self._device)
        return clone.requires_grad_(False).eval()

    @contextmanager
    def outer(self) -> Iterator[None]:
        """Inside: everything but the blocks has its weights, tied as the model wants. May be nested."""
        if self._depth == 0:
            self._kept = _snapshot(self._model, skip=self._blocks)
            self.load_outer()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                _restore(self._kept)
                self._kept = []

    def load_outer(self) -> None:
        """Everything but the blocks gets its weights, for good."""
        groups = [group for name, group in self._keys.groups.items() if not name.startswith(self._inside)]
        missing = self._keys.load({key for group in groups for key in group.sources})
        self._model.tie_weights(missing_keys=missing, recompute_mapping=False)
        output = self._model.get_output_embeddings()
        if self._untie and output is not None and output.weight.is_meta:
            output.weight = self._model.get_input_embeddings().weight
        self._model.requires_grad_(False)


def _snapshot(root: nn.Module, skip: nn.Module | None = None) -> _State:
    inside = {id(module) for module in skip.modules()} if skip is not None else set()
    return [(m, dict(m._parameters), dict(m._buffers)) for m in root.modules() if id(m) not in inside]


def _restore(state: _State) -> None:
    for module, parameters, buffers in state:
        module._parameters.update(parameters)
        module._buffers.update(buffers)


def _move_buffers(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        module._buffers.update({k: b.to(device) for k, b in module._buffers.items() if b is not None})
