"""Matrices of one shape, stacked in one parameter of the model, each packed by itself: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import KernelError
from .bitmask_linear import BitmaskLinear
from .state import lazy_state
from .weight import PackedWeight


class _Member(BitmaskLinear):
    """One of the matrices; its weight is part of the stack's."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return

    def _load_from_state_dict(self, *arguments: Any) -> None:
        return


class PackedStack(nn.ModuleList):
    """In place of a parameter [n, out, in], or [n, in, out] with `transposed`, of which only kept values are held.

    `stack(i, x)` is x [..., in] times matrix i, transposed: [..., out]. `state_dict()` has the dense parameter under
    the stack's own name, and `load_state_dict` takes one whose entries outside the masks are zero.
    """

    def __init__(self, packed: Sequence[Tensor], *, transposed: bool = False, prefill: str = "streamed") -> None:
        """packed: at least one, all of one shape and dtype, from `bitmask_gemv.dispatch.pack`."""
        super().__init__(_Member(matrix, transposed=transposed, prefill=prefill) for matrix in packed)
        shapes = {(tuple(member.weight.shape), member.dtype) for member in self.members}
        if len(shapes) != 1:
            raise KernelError(f"a stack needs matrices of one shape and dtype, got {sorted(map(str, shapes))}")
        self.transposed = transposed

    @property
    def members(self) -> list[BitmaskLinear]:
        """The matrices, in order."""
        return cast(list[BitmaskLinear], list(self))

    def forward(self, index: int, x: Tensor) -> Tensor:
        return self[index](x)

    @property
    def weight(self) -> PackedWeight:
        """The dense parameter: shape, dtype and device at once, numbers when they are read."""
        one = self.members[0].weight
        shape = (len(self), *one.shape)
        strides = (one.shape[0] * one.shape[1], one.shape[1], 1)
        return PackedWeight(shape, strides, one.dtype, one.device, self.dense_weight)

    def dense_weight(self) -> Tensor:
        """`weight` as an ordinary tensor."""
        return torch.stack([member.dense_weight() for member in self.members])

    def bits(self) -> Tensor:
        """The masks as packed rows, uint8 [n * out, ceil(in / 8)]."""
        return torch.cat([member.bits() for member in self.members])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix[:-1]] = self.weight if lazy_state() else self.dense_weight()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix[:-1]
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        given, wanted = state_dict[key], self.weight.shape
        if given.shape != wanted:
            error_msgs.append(f"{key}: shape {list(given.shape)}, the sparse module has {list(wanted)}")
            return
        for index, member in enumerate(self.members):
            fault = member.take(given[index])
            if fault is not None:
                error_msgs.append(f"{key}, matrix {index}: {fault}")
