"""Sums of outer products in float64, by slabs of rows, so that neither a whole product nor two copies ever exist."""

from __future__ import annotations

import torch
from torch import Tensor

from . import distributed

SLAB = 512
PIECE = 2**17  # entries turned into float64 at once: they stay in the cache


class OuterSum:
    """sum a b^T over tokens, float64 [rows, cols], from float32 inputs a [tokens, rows] and b [tokens, cols].

    Products are made in float32 and added in float64. `symmetric`: a and b are always the same, and the part right of
    each slab's own diagonal block is left out until the end. Several processes see the same windows in the same order,
    and each adds up its own slabs only: the result is that of one process.
    """

    def __init__(self, rows: int, cols: int, device: torch.device, *, symmetric: bool = False) -> None:
        self.rows, self.cols, self.device, self.symmetric = rows, cols, device, symmetric
        edges = [(first, min(first + SLAB, rows)) for first in range(0, rows, SLAB)]
        self._slabs = [
            torch.zeros(last - first, last if symmetric else cols, dtype=torch.float64, device=device)
            if distributed.owner_of(number) == distributed.rank()
            else None
            for number, (first, last) in enumerate(edges)
        ]
        self._product = torch.empty(min(SLAB, rows) * cols, device=device)  # buffers used again: fresh pages cost time
        self._piece = torch.empty(max(PIECE, cols), dtype=torch.float64, device=device)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add one window."""
        for slab, columns in zip(self._slabs, a.split(SLAB, dim=1), strict=True):
            if slab is None:
                continue
            product = self._product[: slab.numel()].view(slab.shape)
            torch.mm(columns.T, b[:, : slab.shape[1]], out=product)
            height = max(1, PIECE // slab.shape[1])
            for total, piece in zip(slab.split(height), product.split(height), strict=True):
                total.add_(self._piece[: piece.numel()].view(piece.shape).copy_(piece))

    def take(self) -> Tensor:
        """The sum in float32, on every rank. The float64 slabs are freed one by one; the object is empty afterwards."""
        self._product = self._piece = torch.empty(0)
        blank = torch.empty if distributed.world() == 1 else torch.zeros
        result = blank(self.rows, self.cols, dtype=torch.float32, device=self.device)
        self._slabs.reverse()
        for first in range(0, self.rows, SLAB):
            slab = self._slabs.pop()
            if slab is None:
                continue
            result[first : first + len(slab), : slab.shape[1]] = slab
            if self.symmetric:
                result[:first, first : first + len(slab)] = slab[:, :first].T
                block = result[first : first + len(slab), first : first + len(slab)]
                block.copy_(block.tril() + block.tril(-1).T)  # products need not be symmetric to the last bit
        return distributed.sum_(result)  # exact: every entry is zero on all ranks but one
