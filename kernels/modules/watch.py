"""Whether modules and their tensors are still as they were: what a call that was prepared for them looks at each time.

`.to`, offload hooks, assign-load, adapters, swapped layers and hooks that somebody adds all show in a module's own
dictionaries. Comparing them takes well below a microsecond per tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """Some modules. Their tensors are not kept alive."""

    def __init__(self, modules: Sequence[nn.Module], constants: Sequence[str] = ()) -> None:
        """Modules, not their children: what of them matters is to be named as well, attributes by `constants`."""
        self._modules = [
            (module, module.__dict__, type(module), module.__dict__.get("forward"), _hooked(module), _children(module))
            for module in modules
        ]
        self._tensors = [
            _known(held, name, tensor)
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]
        self._constants = [
            (module.__dict__, name, module.__dict__[name])
            for module in modules
            for name in constants
            if name in module.__dict__
        ]

    def plain(self) -> bool:
        """Whether nothing but `forward` runs when one of the modules is called."""
        return not any(hooked for *_, hooked, _ in self._modules)

    def same(self) -> bool:
        """Written out in one piece: it runs for every block and token."""
        for module, own, kind, forward, hooked, children in self._modules:
            if (
                type(module) is not kind
                or own.get("forward") is not forward
                or bool(own["_forward_hooks"] or own["_forward_pre_hooks"]) is not hooked
            ):
                return False
            held = own["_modules"]
            if len(held) != len(children):
                return False
            for name, child in children:
                if held.get(name) is not child:
                    return False
        for own, name, value in self._constants:
            if own.get(name) != value:
                return False
        for held, name, known, place, shape, strides, dtype, version in self._tensors:
            tensor = held.get(name)
            if tensor is None:
                if known is not None:
                    return False
                continue
            if (
                known is None
                or known() is not tensor
                or tensor.data_ptr() != place
                or tensor.shape != shape
                or tensor.stride() != strides
                or tensor.dtype is not dtype
                or (version is not None and tensor._version != version)
            ):
                return False
        return True


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _children(module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    return list(module._modules.items())


def _known(held: Any, name: str, tensor: Tensor | None) -> tuple[Any, ...]:
    """Where the tensor is held, the tensor without keeping it alive, and what is compared."""
    if tensor is None:
        return held, name, None, 0, (), (), None, None
    version = None if tensor.is_inference() else tensor._version
    return held, name, weakref.ref(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, version


def globally_hooked() -> bool:
    """Whether torch calls something around the forward of every module."""
    module: Any = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
