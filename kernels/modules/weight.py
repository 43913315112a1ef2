"""What a sparse module answers when it is asked for its `weight`: a tensor without memory of its own.

Code around models asks a layer's weight for shape, dtype and device, often dozens of times, and sometimes adds to it in
place. A property that expanded the matrix would be slow in the first case and lose the update in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map

from ...errors import KernelError
from ..arguments import name

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class PackedWeight(Tensor):
    """The dense weight of a packed module, expanded by each operation that reads it.

    Shape, dtype, device and `detach` cost nothing. Every other operation sees the dense matrix (pruned entries +0.0);
    views of it cannot be written either, all else are ordinary tensors. Writing raises KernelError: there is nothing
    that a write could reach.
    """

    read: Callable[[], Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[], Tensor],
    ) -> PackedWeight:
        """`read` makes the dense tensor."""
        made = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        made.read = read
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={list(self.shape)}, dtype={name(self.dtype)}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME:
            return _like(args[0], args[0].read)
        if _writes(func, args, kwargs):
            raise KernelError(
                "the weight of a sparse module cannot be written in place: it is packed",
                hint="load the dense weights for training or merging: gossamer convert OUT DENSE --to dense",
            )
        args, kwargs = tree_map(_expand, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map(_protect, result) if _is_view(func) else result


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, or the dense matrix that a PackedWeight stands for."""
    return tensor.read() if isinstance(tensor, PackedWeight) else tensor


def _like(tensor: Tensor, read: Callable[[], Tensor]) -> PackedWeight:
    return PackedWeight(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, read)


def _expand(value: Any) -> Any:
    return value.read() if isinstance(value, PackedWeight) else value


def _protect(view: Any) -> Any:
    return _like(view, lambda: view) if isinstance(view, Tensor) else view


def _is_view(func: Any) -> bool:
    """Whether what the operation returns shares memory with an argument: a write into it would be lost."""
    return any(one.alias_info is not None for one in func._schema.returns)


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an argument that the operation changes is, or holds, a packed weight."""
    if not func._schema.is_mutable:
        return False
    declared = func._schema.arguments
    given = [*zip(declared, args, strict=False), *((one, kwargs[one.name]) for one in declared if one.name in kwargs)]
    return any(
        one.alias_info is not None
        and one.alias_info.is_write
        and tree_any(lambda value: isinstance(value, PackedWeight), value)
        for one, value in given
    )
