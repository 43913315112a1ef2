"""Packed sparse matrices of int8 values."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..bitmask import dispatch as bitmask
from ..int8_gemv.dispatch import GROUP, int8_gemv, pack
from .case import Case

MUST = 2.2  # over the fastest dense product, at 50 %


def int8_cases(x: Tensor, weight: Tensor, generator: Generator) -> list[Case]:
    """The weight under a random mask."""
    mask = torch.rand(weight.shape, generator=generator) >= 0.5
    return [int8_case(x, weight, mask, name="int8 bitmask 50%", must=MUST)]


def int8_case(x: Tensor, weight: Tensor, mask: Tensor, *, name: str = "int8", must: float | None = None) -> Case:
    """The kept weights rounded to 127 steps on either side of 0 per group; the truth has the rounded weights.

    x moves by half a step of its group, largest / 127, and less than 2^-14 steps for rounded factors.
    """
    rows, cols = weight.shape
    kept = weight.float() * mask
    scales = torch.stack([part.abs().amax(1) for part in kept.split(GROUP, 1)], 1).div(127).half()
    steps = scales.float().repeat_interleave(GROUP, 1)[:, :cols]
    whole = (kept / steps).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    bits = bitmask.pack_bits(mask)
    packed = pack(bits, bitmask.compress(whole, bits), scales, cols)
    moved = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.double().split(GROUP, 1)], 1)
    moved = moved / 127 * (0.5 + 2.0**-14)
    return Case(name, lambda: int8_gemv(x, packed, rows), packed.nbytes, x, whole * steps, must=must, moved=moved)
