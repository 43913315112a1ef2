"""Packed sparse matrices: unstructured, and 2:4 as one of their patterns."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..bitmask import dispatch as bitmask
from ..bitmask_gemv.dispatch import bitmask_gemv, pack
from .case import Case

MUST = {0.5: 1.5, 0.7: 1.9, 0.8: 2.0}  # sparsity -> speedup over the fastest dense product


def bitmask_cases(x: Tensor, weight: Tensor, generator: Generator) -> list[Case]:
    """The weight under random masks."""
    rows, cols = weight.shape
    found = []
    for share, must in MUST.items():
        mask = torch.rand(rows, cols, generator=generator) >= share
        found.append(bitmask_case(x, weight, mask, name=f"bitmask {share:.0%}", must=must))
    if cols % 4 == 0:
        order = torch.rand(rows, cols // 4, 4, generator=generator)
        least = order.kthvalue(2, dim=-1, keepdim=True).values
        mask = (order > least).view(rows, cols)
        found.append(bitmask_case(x, weight, mask, name="bitmask 2:4", must=MUST[0.5]))
    return found


def bitmask_case(x: Tensor, weight: Tensor, mask: Tensor, *, name: str = "bitmask", must: float | None = None) -> Case:
    """The kernel on one weight and mask."""
    bits = bitmask.pack_bits(mask)
    packed = pack(bits, bitmask.compress(weight, bits), weight.shape[1])
    rows = weight.shape[0]
    return Case(name, lambda: bitmask_gemv(x, packed, rows), packed.nbytes, x, weight * mask, must=must)
