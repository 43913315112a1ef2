"""A linear layer whose 16-bit weights stay packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..bitmask import dispatch as bitmask
from ..bitmask_gemv.dispatch import bitmask_dense, bitmask_gemv, describe, pack, unpack
from ..together.dispatch import together
from .sparse_linear import SparseLinear


class BitmaskLinear(SparseLinear):
    """A SparseLinear for bfloat16 and float16, x in the dtype of W. N:M patterns are masks like any others.

    `load_state_dict` takes a weight whose entries outside the mask are zero: the mask belongs to the module.
    """

    def __init__(
        self, packed: Tensor, bias: Tensor | None = None, *, transposed: bool = False, prefill: str = "streamed"
    ) -> None:
        """packed: from `bitmask_gemv.dispatch.pack`."""
        record = describe(packed)
        shape = (record.rows, record.cols)
        super().__init__(packed, shape, record.dtype, bias, transposed=transposed, prefill=prefill)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> BitmaskLinear:
        """From W [out, in] and a bool mask of its shape, True where a weight is kept; W elsewhere is not looked at."""
        bits = bitmask.pack_bits(mask.cpu())
        packed = pack(bits, bitmask.compress(weight.detach().cpu(), bits), weight.shape[1])
        return cls(packed.to(weight.device), bias)

    @staticmethod
    def run(x: Tensor, matrices: list[Tensor]) -> list[Tensor]:
        return together(x, matrices)

    def gemv(self, x: Tensor) -> Tensor:
        return bitmask_gemv(x, self.packed, self.out_features)

    def expand(self, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return bitmask_dense(packed, rows, cols, dtype)

    def bits(self) -> Tensor:
        return unpack(self.packed)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitmaskLinear:
        """`.to`, `.half` and the like: the packed bytes move, their values are cast. KernelError for float32."""
        wanted = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        if wanted is not self.dtype:
            bits, values, cols = unpack(self.packed)
            self.packed = pack(bits, values.to(wanted), cols).to(self.packed.device)
            self.dtype = wanted
        super()._apply(fn, recurse)
        return self

    def take(self, weight: Tensor) -> str | None:
        bits, _, cols = unpack(self.packed)
        weight = weight.detach().to("cpu", self.dtype)
        weight = weight.t().contiguous() if self.transposed else weight
        values = bitmask.compress(weight, bits)
        if int(weight.count_nonzero()) != int(values.count_nonzero()):
            return "values that are not zero where the sparse module is pruned"
        self.packed, self._view = pack(bits, values, cols).to(self.packed.device), None
        return None
