"""A linear layer whose int8 weights stay packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import CODES, MAX_ROWS, name
from ..int8_gemv.dispatch import dense, describe, int8_dense, int8_gemv, unpack
from ..int8_gemv.reference import quantise
from .siblings import product
from .sparse_linear import SparseLinear


class Int8BitmaskLinear(SparseLinear):
    """A SparseLinear of kept int8 values and a float16 scale per row and 128 columns.

    x and y in the compute dtype: bfloat16, float16 or float32. The kernel quantises x to int8 as well; the dense view
    does not. `.to(dtype)` changes the compute dtype, never what is held. `load_state_dict` takes only the very numbers
    that are held: quantising others would change them unseen.
    """

    few_rows = MAX_ROWS  # a prompt is read once: there the exact x is worth the time

    def __init__(
        self,
        packed: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        transposed: bool = False,
        prefill: str = "streamed",
    ) -> None:
        """packed: from `int8_gemv.dispatch.pack`."""
        record = describe(packed)
        shape = (record.rows, record.cols)
        super().__init__(packed, shape, _compute(dtype), bias, transposed=transposed, prefill=prefill)

    def gemv(self, x: Tensor) -> Tensor:
        return int8_gemv(x, self.packed, self.out_features)

    def few_product(self, x: Tensor) -> Tensor:
        return product(self, x, _each)

    def seen(self, x: Tensor) -> Tensor:
        """x as the kernel quantises it, rounded to its dtype."""
        numbers, scales = quantise(x.reshape(-1, self.in_features))
        return (numbers * scales[..., None]).flatten(1)[:, : self.in_features].reshape(x.shape).to(x.dtype)

    def expand(self, packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return int8_dense(packed, rows, cols, dtype)

    def bits(self) -> Tensor:
        return unpack(self.packed)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8BitmaskLinear:
        """`.to`, `.half` and the like: the packed bytes move, the compute dtype changes. KernelError for float64."""
        self.dtype = _compute(fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype)
        super()._apply(fn, recurse)
        return self

    def take(self, weight: Tensor) -> str | None:
        given = weight.to(self.packed.device)
        given = given.t() if self.transposed else given
        if weight.dtype in CODES and torch.equal(dense(self.packed, weight.dtype), given):
            return None
        return (
            "other weights than the int8 ones of the sparse module; quantising them here would change them unseen, so "
            "load them into a dense model and compress it anew"
        )


def _each(x: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    return [int8_gemv(x, packed, describe(packed).rows) for packed in matrices]


def _compute(dtype: torch.dtype) -> torch.dtype:
    if dtype not in CODES:
        raise KernelError(f"an int8 layer cannot compute in {name(dtype)}, allowed: {', '.join(map(name, CODES))}")
    return dtype
