"""Kept values as 8-bit integers in plain torch: this file defines the numbers, on any device.

A row is cut into groups of 128 inputs, the last one shorter. Kept weight w of a group with scale s becomes the integer
q = round(w / s), ties to even, in [-127, 127]; it is read back as q s, which is exact in float32 (7 and 11 bits), and
then rounded once, to the dtype of the weight. Everything is computed in float32.

The arguments are taken as checked; `dispatch` does that. A better choice of s and q, one that minimises the error of
the layer's output under its Gram matrix, would replace `scales` and `codes` and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128
LARGEST = 127
_HALF = torch.finfo(torch.float16)


def limit(dtype: torch.dtype) -> float:
    """The largest scale: of float16 weights the last one whose 127-fold is still finite in float16."""
    return 515.5 if dtype is torch.float16 else _HALF.max


def group_count(cols: int) -> int:
    return -(-cols // GROUP)


def largest(weight: Tensor, kept: Tensor) -> Tensor:
    """Largest |w| among the kept weights of every group, float32 [r, groups]; 0 where nothing is kept."""
    sizes = weight.float().abs().masked_fill_(~kept, 0)
    return _grouped(sizes).amax(-1)


def scales(most: Tensor, dtype: torch.dtype) -> Tensor:
    """float16 [r, groups]: `most` / 127, rounded up so that no weight is beyond 127 s, but at most `limit(dtype)`.

    Positive float16 numbers are ordered like their bits, so the next one is one bit pattern further.
    """
    wanted = most / LARGEST
    near = wanted.to(torch.float16)
    above = (near.view(torch.int16) + 1).view(torch.float16)
    return torch.where(near.float() < wanted, above, near).clamp_(max=limit(dtype))


def codes(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 [r, c]: round(w / s) in [-127, 127]; 0 where s is 0 and for NaN."""
    per_input = _per_input(scales, weight.shape[1])
    quotients = weight.float() / per_input.masked_fill(per_input == 0, torch.inf)
    return quotients.nan_to_num_(nan=0.0).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def weights(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """dtype [r, c]: q s, rounded once."""
    return (codes.float() * _per_input(scales, codes.shape[1])).to(dtype)


def stray(codes: Tensor, scales: Tensor) -> int:
    """How many entries of int8 [r, c] are not 0 although the scale of their group is."""
    return int(((codes != 0) & (_per_input(scales, codes.shape[1]) == 0)).sum())


def _grouped(matrix: Tensor) -> Tensor:
    """[r, c] -> [r, groups, 128], padded with zeros."""
    rows, cols = matrix.shape
    groups = group_count(cols)
    return functional.pad(matrix, (0, groups * GROUP - cols)).view(rows, groups, GROUP)


def _per_input(scales: Tensor, cols: int) -> Tensor:
    """float32 [r, c]: every input's scale."""
    return scales.float().repeat_interleave(GROUP, 1)[:, :cols]
