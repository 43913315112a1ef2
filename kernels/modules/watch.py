"""Whether modules and their tensors are still as they were: what a call that was prepared for them looks at each time.

`.to`, offload hooks, assign-load, adapters, swapped layers and hooks that somebody adds all show in a module's own
dictionaries. Comparing them takes well below a microsecond per tensor.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..extension import compiled

_LINE = 64
_TENSOR = 192  # bytes of a tensor's own record that are read
_KEYS = 32  # offset of the pointer to a dictionary's entries; only asked for ahead, so nothing depends on it


class Watch:
    """Some modules. Their tensors are not kept alive."""

    def __init__(self, modules: Sequence[nn.Module], constants: Sequence[str] = ()) -> None:
        """Modules, not their children: what of them matters is to be named as well, attributes by `constants`."""
        self._hooked = any(map(_hooked, modules))
        extension = compiled()
        facts: list[Any] = []
        numbers = array("q", [len(modules)])
        for module in modules:
            children = module._modules
            facts += [module, module.__dict__, type(module), module.__dict__.get("forward")]
            facts += [part for child in children.items() for part in child]
            numbers.extend([_hooked(module), len(children)])
        own = [(m.__dict__, name, m.__dict__[name]) for m in modules for name in constants if name in m.__dict__]
        facts += [part for constant in own for part in constant]
        numbers.append(len(own))
        dictionaries = [held for module in modules for held in (module._parameters, module._buffers) if held]
        numbers.append(len(dictionaries))
        for held in dictionaries:
            facts.append(held)
            numbers.append(len(held))
            for name, tensor in held.items():
                facts.append(name)
                numbers.append(tensor is None)
                if tensor is None:
                    continue
                view = [] if extension is None else extension.watch_view(tensor)
                facts.append(weakref.ref(tensor))
                numbers.extend([-1 if tensor.is_inference() else tensor._version, bool(view), *view])
                if not view:
                    facts += [tensor.shape, tensor.stride(), tensor.dtype]
                    numbers.append(tensor.data_ptr())
        self._facts, self._numbers, self._lines = tuple(facts), numbers.tobytes(), _lines(facts)
        self._look: Callable[..., bool] | None = None if extension is None else extension.watch_same

    def plain(self) -> bool:
        """Whether nothing but `forward` runs when one of the modules is called."""
        return not self._hooked

    def same(self) -> bool:
        """In csrc/watch.cpp: it runs for every block and token. False without compiled code."""
        return self._look is not None and self._look(self._facts, self._numbers, self._lines)


def _lines(facts: Sequence[Any]) -> bytes:
    """Addresses of the cache lines that a look at the facts reads, as far as they are known here.

    Between two tokens weights have run through the caches: one line after the other costs a tenth of a microsecond
    each, all asked for at once hardly more than a few.
    """
    found: list[int] = []
    for fact in facts:
        if isinstance(fact, (str, type)):  # compared by their place
            continue
        thing = fact() if isinstance(fact, weakref.ref) else fact
        found += [id(fact), id(thing)]
        if isinstance(thing, torch.Tensor):
            found += [thing._cdata + at for at in range(0, _TENSOR, _LINE)]
            found.append(thing.untyped_storage()._cdata)
        elif isinstance(thing, dict):
            found += _table(thing)
            inner = [thing.get(name) for name in ("_forward_hooks", "_forward_pre_hooks", "_modules")]
            found += [id(one) for one in inner if one is not None]
    return array("Q", dict.fromkeys((address - address % _LINE) % 2**64 for address in found)).tobytes()


def _table(of: dict[Any, Any]) -> list[int]:
    """Addresses of the entries of a dictionary, which lie apart from its header, where `_KEYS` points to them."""
    begin = ctypes.c_size_t.from_address(id(of) + _KEYS).value
    return list(range(begin, begin + max(0, sys.getsizeof(of) - object.__sizeof__({})), _LINE))


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def globally_hooked() -> bool:
    """Whether torch calls something around the forward of every module."""
    module: Any = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
