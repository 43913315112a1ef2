"""The result of `int8_gemv` in plain torch. Every other implementation gives the same bits, so each step is stated.

Columns are in groups of 128. In float32, every operation rounded to nearest, for each row of x and group:

    largest = max |x|;   scale = largest / 127;   q = round(x * (127 / largest)), ties to even: -127 to 127

A group whose largest |x| is below 2^-100 counts as zeros (scale 0). In a group with an infinity or NaN, q is 0 and the
scale NaN, so every output of that row is NaN.

    y = sum over groups, from +0.0 and left to right, of (float32(sum of w * q) * weight scale) * scale

w is the int8 weight, 0 where nothing is kept. The sum of w * q is a whole number below 2^21, exact however it is found.
y is rounded once more to the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bitmask import reference as bitmask

GROUP = 128
SMALLEST = 2.0**-100


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [batch, cols] as whole numbers, float32 [batch, groups, 128] with zeros behind, and scales [batch, groups]."""
    batch, cols = x.shape
    groups = -(-cols // GROUP)
    padded = x.new_zeros(batch, groups * GROUP, dtype=torch.float32)
    padded[:, :cols] = x
    padded = padded.view(batch, groups, GROUP)
    largest = padded.abs().amax(-1)
    ordinary = largest.isfinite() & (largest >= SMALLEST)
    # Tensors, not numbers: torch divides by a number, or a number by a tensor, with a rounded reciprocal.
    most = torch.full_like(largest, 127.0)
    inverse = torch.where(ordinary, most / largest, 0.0)
    numbers = torch.where(ordinary[..., None], (padded * inverse[..., None]).round(), 0.0)
    scales = torch.where(ordinary, largest / most, torch.where(largest.isfinite(), 0.0, float("nan")))
    return numbers, scales


def int8_gemv(x: Tensor, bits: Tensor, values: Tensor, scales: Tensor, cols: int) -> Tensor:
    """x [..., cols] times the matrix [rows, cols] of `dispatch.pack` transposed, all on the device of x."""
    rows, groups = bits.shape[0], scales.shape[1]
    weight = torch.zeros(rows, groups * GROUP, device=x.device)
    weight[:, :cols] = bitmask.expand(values, bits, cols)
    weight = weight.view(rows, groups, GROUP)
    numbers, factors = quantise(x.reshape(x.shape[:-1].numel(), cols))
    y = torch.zeros(len(numbers), rows, device=x.device)
    for g in range(groups):
        # Whole numbers below 2^24, so these float32 sums are exact in any order, unless the device cuts its products
        # short, which float64 prevents at no cost that matters here.
        dots = (numbers[:, g].double() @ weight[:, g].double().t()).float()
        y = y + (dots * scales[:, g].float()) * factors[:, g, None]
    return y.view(*x.shape[:-1], rows).to(x.dtype)


def dense(bits: Tensor, values: Tensor, scales: Tensor, cols: int, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, cols]: float32(value) * float32(scale) rounded to `dtype`, +0.0 where nothing is kept."""
    whole = bitmask.expand(values, bits, cols)
    return dequantise(whole, scales, dtype)


def dequantise(whole: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 [rows, cols] times scales [rows, groups]. No scale is negative, so a pruned 0 becomes +0.0."""
    weight = torch.empty(whole.shape, dtype=dtype, device=whole.device)
    step = 1 + (1 << 20) // max(1, whole.shape[1])  # rows at a time: float32 is up to four times as large as the result
    for first in range(0, len(whole), step):
        part = slice(first, first + step)
        factors = scales[part].float().repeat_interleave(GROUP, 1)[:, : whole.shape[1]]
        weight[part] = whole[part].float().mul_(factors)
    return weight
