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
    """Some modules, without keeping them or their tensors alive."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Modules, not their children: what of them matters is to be named as well."""
        self._modules = [_Module(module) for module in modules]
        self._tensors = [
            _known(held, name, tensor)
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]

    def plain(self) -> bool:
        """Whether nothing but `forward` runs when one of the modules is called."""
        return not any(one.hooked for one in self._modules)

    def same(self) -> bool:
        for one in self._modules:
            if one.changed():
                return False
        for held, name, known, place, size, dtype, version in self._tensors:
            tensor = held.get(name)
            if tensor is None:
                if known is not None:
                    return False
                continue
            if (
                known is None
                or known() is not tensor
                or tensor.data_ptr() != place
                or tensor.numel() != size
                or tensor.dtype is not dtype
                or (version is not None and tensor._version != version)
            ):
                return False
        return True


class _Module:
    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind = weakref.ref(module), type(module)
        self._forward = module.__dict__.get("forward")
        self._children = list(module._modules.items())
        self.hooked = bool(module._forward_hooks or module._forward_pre_hooks)

    def changed(self) -> bool:
        module = self._module()
        if module is None or type(module) is not self._kind or module.__dict__.get("forward") is not self._forward:
            return True
        if self.hooked is not bool(module._forward_hooks or module._forward_pre_hooks):
            return True
        held = module._modules
        for name, child in self._children:
            if held.get(name) is not child:
                return True
        return len(held) != len(self._children)


def _known(held: Any, name: str, tensor: Tensor | None) -> tuple[Any, ...]:
    """Where the tensor is held, the tensor without keeping it alive, and what is compared."""
    if tensor is None:
        return held, name, None, 0, 0, None, None
    version = None if tensor.is_inference() else tensor._version
    return held, name, weakref.ref(tensor), tensor.data_ptr(), tensor.numel(), tensor.dtype, version


def globally_hooked() -> bool:
    """Whether torch calls something around the forward of every module."""
    module: Any = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
