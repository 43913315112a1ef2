"""Skipped inputs over a packed sparse matrix: half of the inputs, half of the weights."""

from __future__ import annotations

from torch import Generator, Tensor, rand

from ..bitmask import dispatch as bitmask
from ..dual_gemv.dispatch import dual_gemv, pack
from .case import Case
from .cases_channel import skipping

MUST = 2.2  # over the fastest dense product
_BLOCK = 64  # outputs that have a mask of 8 bytes


def dual_cases(x: Tensor, weight: Tensor, generator: Generator) -> list[Case]:
    """The weight under a random mask. Counted are masks and kept values of active inputs."""
    rows, cols = weight.shape
    mask = rand(rows, cols, generator=generator) >= 0.5
    bits = bitmask.pack_bits(mask)
    packed = pack(bits, bitmask.compress(weight, bits), cols)
    threshold, seen, active = skipping(x, 0.5)
    masks = int(active.sum()) * -(-rows // _BLOCK) * _BLOCK // 8
    read = masks + int(mask[:, active].sum()) * weight.element_size()
    call = lambda: dual_gemv(x, packed, threshold, rows)
    return [Case("dual 50% x 50%", call, read, seen, weight * mask, must=MUST)]
