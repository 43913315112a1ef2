"""Kept values as 8-bit integers with float16 scales: the public names. Plain torch, some rows at a time.

Definition and numbers: `reference`. Every argument is checked here, those of a matrix that was read from a file too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import name
from ..bitmask import dispatch as bitmask
from . import reference
from .reference import GROUP

__all__ = ["DTYPES", "GROUP", "check_scales", "dequantise", "group_count", "group_scales", "quantise", "round_to"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
group_count = reference.group_count
_PIECE = 1 << 20  # entries at a time: a few float32 copies of a piece stay near the processor


def quantise(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """(values int8 [nnz] in row order, scales float16 [r, ceil(c / 128)]) of a weight [r, c] and its packed mask.

    |w - q s| is at most s / 2 for every kept w. What the mask drops is not looked at, NaN included. A group that keeps
    nothing but zeros, or nothing, has scale 0. Raises KernelError for kept weights that are not finite or exceed
    127 * 65504, and for what does not fit.
    """
    scales = group_scales(weight, bits)
    return round_to(scales, weight, bits), scales


def group_scales(weight: Tensor, bits: Tensor) -> Tensor:
    """The scales of `quantise` alone, float16 [r, ceil(c / 128)]."""
    _check_weight(weight, bits)
    cols = weight.shape[1]
    scales = torch.zeros(weight.shape[0], group_count(cols), dtype=torch.float16, device=weight.device)
    for start, stop in _pieces(weight.shape[0], cols):
        most = reference.largest(weight[start:stop].detach(), bitmask.unpack_bits(bits[start:stop], cols))
        _check_range(most, weight.dtype)
        scales[start:stop] = reference.scales(most, weight.dtype)
    return scales


def round_to(scales: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    """int8 [nnz]: round(w / s) of the kept weights, in [-127, 127], for scales that are given.

    Of weights that `dequantise` made with these scales it gives back the very values. Any weight is taken: NaN and
    weights of a group with scale 0 become 0, those beyond 127 s become 127 or -127.
    """
    _check_weight(weight, bits)
    rows, cols = weight.shape
    check_scales(scales, rows, cols, torch.float32)
    found = [torch.empty(0, dtype=torch.int8, device=weight.device)]
    for start, stop in _pieces(rows, cols):
        codes = reference.codes(weight[start:stop].detach(), scales[start:stop])
        found.append(bitmask.compress(codes, bits[start:stop]))
    return torch.cat(found)


def dequantise(values: Tensor, scales: Tensor, bits: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """weight [r, cols] of `dtype`: q s rounded once where a bit is set, +0.0 elsewhere.

    Raises KernelError unless there is one of `values`, int8 in [-127, 127], for every set bit, `scales` fit, and
    values are 0 where their scale is 0.
    """
    check_codes(values)
    if dtype not in DTYPES:
        raise KernelError(f"a weight of {name(dtype)}; allowed: {', '.join(map(name, DTYPES))}")
    bitmask.check_values(values, bits, cols)
    rows = bits.shape[0]
    check_scales(scales, rows, cols, dtype)
    weight = torch.empty(rows, cols, dtype=dtype, device=values.device)
    ends = [0, *bitmask.row_counts(bits).cumsum(0).tolist()]
    for start, stop in _pieces(rows, cols):
        own = scales[start:stop]
        codes = bitmask.expand(values[ends[start] : ends[stop]], bits[start:stop], cols)
        if bool((own == 0).any()) and reference.stray(codes, own):
            raise KernelError("values are not 0 in a group whose scale is 0")
        weight[start:stop] = reference.weights(codes, own, dtype)
    return weight


def check_codes(values: Tensor) -> None:
    """Raises KernelError unless values are int8 in [-127, 127]."""
    if values.dtype != torch.int8:
        raise KernelError(f"values are {name(values.dtype)}, allowed: int8")
    if bool((values == -128).any()):
        raise KernelError("values hold -128, allowed: -127 to 127")


def check_scales(scales: Tensor, rows: int, cols: int, dtype: torch.dtype) -> None:
    """Raises KernelError unless scales are float16 [rows, ceil(cols / 128)], not negative, and at most 65504.

    Of float16 weights at most 515.5: 127 times more would be infinite.
    """
    shape = (rows, group_count(cols))
    if scales.dtype != torch.float16 or tuple(scales.shape) != shape:
        raise KernelError(f"scales must be float16 {list(shape)}, got {name(scales.dtype)} {list(scales.shape)}")
    most = reference.limit(dtype)
    if not bool(((scales >= 0) & (scales <= most) & ~scales.signbit()).all()):  # NaN is in no order
        raise KernelError(f"scales of {name(dtype)} weights must be numbers from 0 to {most:g}")


def _check_weight(weight: Tensor, bits: Tensor) -> None:
    if weight.dtype not in DTYPES or weight.dim() != 2:
        allowed = ", ".join(map(name, DTYPES))
        raise KernelError(f"a weight must be [rows, cols] of {allowed}, got {name(weight.dtype)} {list(weight.shape)}")
    rows, cols = weight.shape
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-cols // 8)):
        raise KernelError(
            f"bits must be uint8 [{rows}, {-(-cols // 8)}] for a weight {list(weight.shape)}, "
            f"got {name(bits.dtype)} {list(bits.shape)}"
        )
    if bits.device != weight.device:
        raise KernelError(f"bits are on {bits.device}, the weight on {weight.device}; they must be on the same device")


def _check_range(most: Tensor, dtype: torch.dtype) -> None:
    """float64 weights may be finite and beyond float32: they are too large as well."""
    allowed = reference.LARGEST * torch.finfo(torch.float16).max
    worst = float(most.max()) if most.numel() else 0.0
    if not worst <= allowed:
        raise KernelError(
            f"a kept weight is {worst:g}; int8 values with float16 scales hold finite weights up to {allowed:g}",
            hint="the weights are damaged, or need 16-bit values",
        )


def _pieces(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE // max(1, cols))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
