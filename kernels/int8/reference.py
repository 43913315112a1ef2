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
    divisors = scales.float().masked_fill_(scales == 0, torch.inf)
    quotients = (_grouped(weight.float()) / divisors[:, :, None]).nan_to_num_(nan=0.0)
    return _flat(quotients.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), weight.shape[1])


def weights(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """dtype [r, c]: q s, rounded once."""
    return _flat((_grouped(codes.float()) * scales.float()[:, :, None]).to(dtype), codes.shape[1])


def stray(codes: Tensor, scales: Tensor) -> int:
    """How many entries of int8 [r, c] are not 0 although the scale of their group is."""
    return int(((_grouped(codes) != 0) & (scales == 0)[:, :, None]).sum())


def _grouped(matrix: Tensor) -> Tensor:
    """[r, c] -> [r, groups, 128], padded with zeros; a view where nothing is missing."""
    rows, cols = matrix.shape
    groups = group_count(cols)
    missing = groups * GROUP - cols
    return (functional.pad(matrix, (0, missing)) if missing else matrix).reshape(rows, groups, GROUP)


def _flat(grouped: Tensor, cols: int) -> Tensor:
    """[r, groups, 128] -> [r, c]: the inverse of `_grouped`."""
    return grouped.flatten(1)[:, :cols]
