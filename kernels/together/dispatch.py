"""Several matrices times the same 1 to 8 vectors: query, key and value of one input, or gate and up, cost one call.

The same bits as `dense_gemv` and `bitmask_gemv` one after the other; what is saved is the way from Python to the
threads and back, which small matrices feel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_rows, check_weight
from ..backend import choose
from ..bitmask_gemv.dispatch import bitmask_gemv
from ..bitmask_gemv.record import record_of
from ..dense_gemv.dispatch import dense_gemv
from ..tier import current
from . import cpu


def together(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x [..., in] times each of `weights` transposed: a list of [..., out] in x's dtype.

    A weight is a packed tensor of `bitmask_gemv` (uint8) or a dense matrix [out, in], all of x's dtype and number of
    inputs. No operator of torch: inside torch.compile call the single ones. Raises KernelError as they do.
    """
    matrices = [_matrix(x, weight) for weight in weights]
    if not matrices:
        return []
    cols = matrices[0][1]
    if any(other != cols for _, other in matrices):
        raise KernelError(f"the matrices have {', '.join(str(other) for _, other in matrices)} inputs; they must agree")
    tier = current() if choose(x.device.type) == "cpu" else None
    if tier is None:
        return [_single(x, weight, rows) for weight, (rows, _) in zip(weights, matrices, strict=True)]
    return cpu.together(tier, x, cols, weights, [rows for rows, _ in matrices])


def _matrix(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight that fits x."""
    if weight.dtype is torch.uint8:
        record = record_of(weight)
        check_rows(x, record.cols, record.dtype, record.device)
        return record.rows, record.cols
    check_weight(weight, "weight")
    rows, cols = weight.shape
    check_rows(x, cols, weight.dtype, weight.device)
    return rows, cols


def _single(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    return bitmask_gemv(x, weight, rows) if weight.dtype is torch.uint8 else dense_gemv(x, weight)
