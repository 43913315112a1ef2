"""What linear layers share that hold the kept weights as they are, in 16 bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..bitmask import dispatch as bitmask
from ..record import Record
from .sparse_linear import SparseLinear


class KeptLinear(SparseLinear):
    """A SparseLinear for bfloat16 and float16, x in the dtype of W. N:M patterns are masks like any others.

    `load_state_dict` takes a weight whose entries outside the mask are zero: the mask belongs to the module.
    """

    def __init__(
        self, packed: Tensor, bias: Tensor | None = None, *, transposed: bool = False, prefill: str = "streamed"
    ) -> None:
        """packed: from `pack`."""
        record = self.describe(packed)
        shape = (record.rows, record.cols)
        super().__init__(packed, shape, record.dtype, bias, transposed=transposed, prefill=prefill)

    @staticmethod
    @abstractmethod
    def describe(packed: Tensor) -> Record:
        """Rows, columns and dtype."""

    @staticmethod
    @abstractmethod
    def pack(bits: Tensor, values: Tensor, cols: int) -> Tensor:
        """The layout of the kernels, of masks and kept values, on the CPU."""

    @staticmethod
    @abstractmethod
    def unpack(packed: Tensor) -> tuple[Tensor, Tensor, int]:
        """The inverse of `pack`."""

    @classmethod
    def packed_from(cls, weight: Tensor, mask: Tensor) -> Tensor:
        """W [out, in] under a bool mask of its shape, packed; W elsewhere is not looked at."""
        bits = bitmask.pack_bits(mask.cpu())
        return cls.pack(bits, bitmask.compress(weight.detach().cpu(), bits), weight.shape[1]).to(weight.device)

    def bits(self) -> Tensor:
        return self.unpack(self.packed)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """`.to`, `.half` and the like: the packed bytes move, their values are cast. KernelError for float32."""
        wanted = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        if wanted is not self.dtype:
            bits, values, cols = self.unpack(self.packed)
            self.packed = self.pack(bits, values.to(wanted), cols).to(self.packed.device)
            self.dtype = wanted
        return super()._apply(fn, recurse)

    def take(self, weight: Tensor) -> str | None:
        bits, _, cols = self.unpack(self.packed)
        weight = weight.detach().to("cpu", self.dtype)
        weight = weight.t().contiguous() if self.transposed else weight
        values = bitmask.compress(weight, bits)
        if int(weight.count_nonzero()) != int(values.count_nonzero()):
            return "values that are not zero where the sparse module is pruned"
        self.packed, self._view = self.pack(bits, values, cols).to(self.packed.device), None
        return None
