"""Layout and result of `nm_gemv` in plain torch, on any device: this file defines both.

codes are the row bits of the disk layout, uint8 [rows, ceil(in / 8)]; values [rows, ceil(in / 8) * slots] have the same
number of slots under every byte of them, 8 * keep / group. The arguments are taken as checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bitmask import reference as bitmask


def pack(bits: Tensor, values: Tensor, keep: int, group: int) -> Tensor:
    """values [rows, ...] with fixed stride, of values [nnz] in row order; slots without a weight hold +0.0."""
    mask = _groups(bits, group)
    slots = torch.zeros(mask.shape, dtype=torch.int16, device=values.device)
    slots = slots.masked_scatter_(torch.arange(group, device=bits.device) < mask.sum(-1, keepdim=True), _raw(values))
    return slots[..., :keep].contiguous().view(bits.shape[0], mask.shape[1] * keep).view(values.dtype)


def unpack(codes: Tensor, values: Tensor, keep: int, group: int) -> Tensor:
    """values [nnz] in row order: the inverse of `pack`."""
    filled = _groups(codes, group).sum(-1, keepdim=True)
    slots = _raw(values).view(*filled.shape[:-1], keep)
    return slots[torch.arange(keep, device=codes.device) < filled].view(values.dtype)


def overfull(bits: Tensor, keep: int, group: int) -> int:
    """How many weights the fullest group keeps beyond `keep`; 0 or less: the matrix is N:M."""
    groups = _groups(bits, group)
    return int(groups.sum(-1).amax()) - keep if groups.numel() else 0


def dense(codes: Tensor, values: Tensor, cols: int, keep: int, group: int) -> Tensor:
    """The matrix [rows, cols], +0.0 where nothing is kept. Of a group with too many bits, the first `keep` count."""
    mask = _groups(codes, group)
    rank = mask.cumsum(-1) - 1
    kept = mask & (rank < keep)
    slots = _raw(values).view(*mask.shape[:-1], keep).gather(-1, rank.clamp(0, keep - 1))
    weight = torch.where(kept, slots, slots.new_zeros(()))
    return weight.flatten(1)[:, :cols].contiguous().view(values.dtype)


def nm_gemv(x: Tensor, codes: Tensor, values: Tensor, keep: int, group: int) -> Tensor:
    """x [..., in] times the matrix [out, in] transposed; products and sums in float32, rounded once."""
    weight = dense(codes, values, x.shape[-1], keep, group)
    return (x.float() @ weight.float().t()).to(x.dtype)


def _groups(bits: Tensor, group: int) -> Tensor:
    """bool [rows, groups, group], the bits beyond the last column included."""
    cols = 8 * bits.shape[1]
    return bitmask.unpack_bits(bits, cols).view(bits.shape[0], cols // group, group)


def _raw(values: Tensor) -> Tensor:
    """Values as integers: they are copied, so NaN payloads and the sign of zero survive."""
    return values.contiguous().view(torch.int16)
