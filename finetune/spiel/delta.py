"""Arithmetic of sparse deltas as their files hold them: sums, differences, how much two of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError

_STRIDE = 1 << 31  # a row's keys; columns are below it


@dataclass(frozen=True, eq=False)
class Delta:
    """One layer's entries.

    Attributes:
        values: any float dtype [K].
        columns: uint16 or int32 [K], ascending within a row.
        counts: uint16 or int32 [rows], entries of each row.
    """

    values: Tensor
    columns: Tensor
    counts: Tensor

    def keys(self) -> Tensor:
        """row * 2^31 + column of every entry, ascending, int64 [K]."""
        counts = self.counts.to(torch.int64)
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts, output_size=len(self.columns))
        return rows * _STRIDE + self.columns.to(torch.int64)


def weighted_sum(parts: Sequence[tuple[Delta, float]], name: str) -> Delta:
    """Sum of weight * delta at the union of the positions, summed in float32, in the first one's dtype.

    Entries that come out as zero are left out. `name`: of the layer, for the error.

    Raises:
        CheckpointError: layers of different size, or a sum that is not finite.
    """
    rows = {len(delta.counts) for delta, _ in parts}
    if len(rows) > 1:
        raise CheckpointError(
            f"{name} has {', '.join(map(str, sorted(rows)))} rows in the adapters", hint="they are of different models"
        )
    keys, place = torch.cat([delta.keys() for delta, _ in parts]).unique(return_inverse=True)
    every = torch.cat([delta.values.to(torch.float32) * weight for delta, weight in parts])
    first = parts[0][0]
    total = torch.zeros(len(keys)).index_add_(0, place, every).to(first.values.dtype)
    if not bool(torch.isfinite(total).all()):
        raise CheckpointError(f"{name}: the sum is not finite", hint="take smaller weights, or float32 adapters")
    keys, total = keys[total != 0], total[total != 0]
    counts = torch.bincount(keys // _STRIDE, minlength=len(first.counts))
    return Delta(total, (keys % _STRIDE).to(_wider(parts, "columns")), counts.to(_wider(parts, "counts")))


def compare(a: Delta, b: Delta) -> dict[str, Any]:
    """Entries of both, positions that they share, cosine of the two as vectors, norm of the difference."""
    common = torch.isin(a.keys(), b.keys())
    other = torch.isin(b.keys(), a.keys())
    left, right = a.values.to(torch.float64), b.values.to(torch.float64)
    product = float(left[common] @ right[other])
    squares = float(left @ left), float(right @ right)
    return {
        "entries": (len(left), len(right)),
        "shared": int(common.sum()),
        "product": product,
        "squares": squares,
        "distance": max(0.0, squares[0] + squares[1] - 2 * product) ** 0.5,
    }


def _wider(parts: Sequence[tuple[Delta, float]], name: str) -> torch.dtype:
    dtypes = {getattr(delta, name).dtype for delta, _ in parts}
    return torch.int32 if torch.int32 in dtypes else torch.uint16
