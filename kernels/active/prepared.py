"""A call of `active_gemv` whose weights have been checked before: a step of decoding makes it once per layer and token.

Checking some tensors that nobody has touched since the last token takes longer in Python than small matrices take to
multiply. What is checked again is whether they are the same: memory, size, and what was written into packed ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import CODES, MAX_ROWS
from ..backend import choose
from ..tier import Tier, current
from .dispatch import check


class Prepared:
    """`active_gemv(x, threshold, weights, biases, center)` for any x that is like the first one, on the CPU."""

    def __init__(
        self,
        tier: Tier,
        x: Tensor,
        threshold: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        center: Tensor | None,
    ) -> None:
        """Raises KernelError as `active_gemv` does."""
        outputs = check(x, threshold, weights, biases, center)
        self.tier, self.dtype, self.channels = tier, x.dtype, x.shape[-1]
        self._tensors = [_known(one) for one in (threshold, center, *weights, *biases)]
        self._matrices = [
            (weight.data_ptr(), count, weight.dtype is torch.uint8, 0 if bias is None else bias.data_ptr())
            for weight, bias, count in zip(weights, biases, outputs, strict=True)
        ]
        self._fixed = threshold.data_ptr(), 0 if center is None else center.data_ptr()

    @classmethod
    def of(
        cls,
        x: Tensor,
        threshold: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        center: Tensor | None,
    ) -> Prepared | None:
        """None where no compiled code runs, and for tensors that do not say when they are written to."""
        tier = current() if x.is_cpu and choose("cpu") == "cpu" else None
        if tier is None or any(weight.is_inference() for weight in weights):
            return None
        return cls(tier, x, threshold, weights, biases, center)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def run(self, x: Tensor, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], int] | None:
        """The products and how many inputs were read; None where anything is not as it was: then all is to be checked.

        tensors: threshold, center, weights and biases, as they are now.
        """
        if (
            len(tensors) != len(self._tensors)
            or x.dtype is not self.dtype
            or not x.is_cpu
            or not x.is_contiguous()
            or current() is not self.tier
        ):
            return None
        *lead, channels = x.shape
        batch = 1
        for length in lead:
            batch *= length
        address = x.data_ptr()
        if channels != self.channels or not 1 <= batch <= MAX_ROWS or address == 0 or x.requires_grad:
            return None
        for tensor, (known, place, size, version) in zip(tensors, self._tensors, strict=True):
            if tensor is not known():
                return None
            if tensor is None:
                continue
            if tensor.data_ptr() != place or tensor.numel() != size:
                return None
            if version is not None and tensor._version != version:
                return None
        results = [x.new_empty((*lead, matrix[1])) for matrix in self._matrices]
        matrices = [(*matrix, y.data_ptr()) for matrix, y in zip(self._matrices, results, strict=True)]
        limits, middle = self._fixed
        code, threads, call = CODES[x.dtype], torch.get_num_threads(), self.tier.module.active_gemv
        return results, call(self.tier.address, code, address, batch, channels, limits, middle, matrices, threads)


def _known(tensor: Tensor | None) -> tuple[Callable[[], Tensor | None], int, int, int | None]:
    """The tensor, without keeping it alive, where it lies, its size, and the version of a packed one."""
    if tensor is None:
        return _nothing, 0, 0, None
    version = tensor._version if tensor.dtype is torch.uint8 else None
    return weakref.ref(tensor), tensor.data_ptr(), tensor.numel(), version


def _nothing() -> None:
    return None
