"""The same in plain torch, for any device and float dtype.

torch's sparse products are two to four times as fast on operands that lie channel by channel, transposes included.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor


def csr_linear(x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x S^T by a sparse product, [tokens, rows]."""
    return (_csr(values, rowptr, columns, x.shape[1]) @ _by_channel(x)).t().contiguous()


def csr_sampled(gy: Tensor, x: Tensor, rowptr: Tensor, columns: Tensor) -> Tensor:
    """gy^T x at the positions, by a product that is sampled there."""
    zero = _csr(gy.new_zeros(len(columns)), rowptr, columns, x.shape[1])
    return torch.sparse.sampled_addmm(zero, _by_channel(gy), _by_channel(x).t(), beta=0.0).values()


def _by_channel(x: Tensor) -> Tensor:
    return x.t().contiguous()


def _csr(values: Tensor, rowptr: Tensor, columns: Tensor, cols: int) -> Tensor:
    _hear_beta_warning()
    return torch.sparse_csr_tensor(rowptr, columns, values, (len(rowptr) - 1, cols), check_invariants=False)


@cache
def _hear_beta_warning() -> None:
    """torch says once per process that its CSR tensors are in beta; users of an adapter cannot do anything about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(2).to_sparse_csr()
