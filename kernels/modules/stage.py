"""Linear layers that get the same x, as the compiled halves of a block take them: addresses of checked tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import KernelError
from ..arguments import CODES, check_bias, check_weight
from ..int8_gemv.dispatch import describe as describe_int8
from .bitmask_linear import BitmaskLinear
from .channel_linear import ChannelSparseLinear
from .dense_linear import DenseLinear
from .dual_linear import DualSparseLinear
from .int8_linear import Int8BitmaskLinear
from .thresholds import ThresholdLinear

PLAIN, INT8, ACTIVE = 0, 1, 2  # enum Kind of csrc/step.h
Words = tuple[int, int, int, list[tuple[int, int, bool, int, int, int]]]


@dataclass(frozen=True)
class Stage:
    """`words`: of each call, kind, threshold, center and matrices (csrc/module.cpp). `skips`: some of them skip inputs.

    `held`: tensors that were made for it and that nobody else keeps.
    """

    words: list[Words]
    skips: bool
    held: tuple[Tensor, ...]


def stage(layers: Sequence[nn.Module], cols: int, rows: Sequence[int], dtype: torch.dtype) -> Stage | None:
    """`layers` [rows[i], cols] with an x of `dtype`; None where one of them is computed in another way.

    Layers of one kind are one call, those that skip if they share their active inputs (`ThresholdLinear.share`).
    """
    try:
        for layer, count in zip(layers, rows, strict=True):
            if not _fits(layer, count, cols, dtype):
                return None
        held = [
            start for layer in layers if isinstance(layer, ThresholdLinear) and (start := layer.start()) is not None
        ]
        return Stage(_words(layers), any(isinstance(layer, ThresholdLinear) for layer in layers), tuple(held))
    except KernelError:
        return None  # the layer itself says what is wrong


def _fits(layer: Any, rows: int, cols: int, dtype: torch.dtype) -> bool:
    if "forward" in layer.__dict__:  # somebody's own, as accelerate's hooks set it
        return False
    if type(layer) is DenseLinear:
        check_weight(layer.weight, "weight")
        place, shape, own = layer.weight, tuple(layer.weight.shape), layer.weight.dtype
    elif type(layer) in (BitmaskLinear, Int8BitmaskLinear, DualSparseLinear, ChannelSparseLinear):
        if layer.reference:
            return False
        if type(layer) is ChannelSparseLinear:
            check_weight(layer.packed, "weight")
        elif type(layer) is Int8BitmaskLinear:
            describe_int8(layer.packed)
        else:
            layer.describe(layer.packed)
        place, shape, own = layer.packed, (layer.out_features, layer.in_features), layer.dtype
        if isinstance(layer, ThresholdLinear) and layer.left is not None:
            return False
    else:
        return False
    check_bias(layer.bias, rows, torch.empty(0, dtype=dtype))
    return place.is_cpu and shape == (rows, cols) and own is dtype and dtype in CODES


def _words(layers: Sequence[Any]) -> list[Words]:
    words: list[Words] = []
    groups: dict[Any, Words] = {}
    for output, layer in enumerate(layers):
        kind = ACTIVE if isinstance(layer, ThresholdLinear) else INT8 if type(layer) is Int8BitmaskLinear else PLAIN
        alike: Any = kind if kind != ACTIVE else id(layer.siblings) if layer.siblings is not None else id(layer)
        if alike not in groups:
            center = layer.center if kind == ACTIVE else None
            limits = layer.threshold.data_ptr() if kind == ACTIVE else 0
            groups[alike] = kind, limits, 0 if center is None else center.data_ptr(), []
            words.append(groups[alike])
        matrix = layer.matrix()
        start = layer.start() if kind == ACTIVE else None
        bias = None if start is not None else layer.bias
        groups[alike][3].append((
            matrix.data_ptr(), layer.out_features, matrix.dtype is torch.uint8, _place(start), _place(bias), output,
        ))  # fmt: skip
    return words


def _place(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
