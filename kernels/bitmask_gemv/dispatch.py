"""Bitmask matrix times 1 to 8 vectors: the public names. Compiled code, Triton on GPUs, plain torch without either.

A matrix is one uint8 tensor, made by `pack` from the layout of checkpoints. It can be moved, copied and saved like any
tensor; its content is checked when it is first used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_rows, name
from ..backend import choose
from ..bitmask import dispatch as bitmask
from ..extension import compiled
from ..library import operator
from ..tier import current
from . import cpu, layout, reference
from .record import Record, record_of

_DTYPES = (torch.bfloat16, torch.float16)


def pack(bits: Tensor, values: Tensor, cols: int) -> Tensor:
    """The machine layout, uint8 [size], of row bits [rows, ceil(cols / 8)] and values [nnz] in row order, on the CPU.

    values: bfloat16 or float16. Lossless: `unpack` gives both back bit for bit. Raises KernelError when they do not
    fit.
    """
    if values.dtype not in _DTYPES:
        allowed = " and ".join(map(name, _DTYPES))
        raise KernelError(f"values are {name(values.dtype)}, allowed: {allowed}", hint="convert the weight to bfloat16")
    if not (bits.is_cpu and values.is_cpu):
        raise KernelError(f"bits are on {bits.device}, values on {values.device}; packing takes both on the CPU")
    bitmask.check_values(values, bits, cols)
    bits, values = bits.contiguous(), values.detach().contiguous()
    module = compiled()
    return layout.pack(bits, values, cols) if module is None else cpu.pack(module, bits, values, cols)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, int]:
    """(bits [rows, ceil(cols / 8)], values [nnz], cols) of a packed matrix, on the CPU: the inverse of `pack`."""
    packed = packed.detach().cpu()
    record = record_of(packed)
    module = compiled()
    if module is None:
        return layout.unpack(packed)
    bits, values, _ = cpu.unpack(module, packed, record.rows, record.cols, record.nnz, record.dtype)
    return bits, values, record.cols


def dense(packed: Tensor) -> Tensor:
    """The matrix [out, in] with +0.0 where nothing is kept, on the packed tensor's device."""
    tier = current() if packed.is_cpu else None
    if tier is not None:
        record = record_of(packed)
        return cpu.dense(tier, packed, record.rows, record.cols, record.dtype)
    bits, values, cols = unpack(packed)
    return bitmask.expand(values, bits, cols).to(packed.device)


def describe(packed: Tensor) -> Record:
    """Rows, columns, kept values and dtype of a packed matrix. Raises KernelError, naming what is wrong with it."""
    return record_of(packed)


def bitmask_gemv(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    """x [..., in] times the packed matrix [rows, in] transposed: [..., rows] in x's dtype, sums in float32.

    x: the dtype of the values, contiguous, 1 to 8 rows. Pruned entries multiply as +0.0, as in the dense matrix: an
    infinity in x makes NaN of every output. The same bits for any number of threads, and for a row alone or among
    others. Raises KernelError for what does not fit, a malformed matrix, and where a gradient would be needed.
    """
    return _operator(x, packed, rows)


def bitmask_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """`dense(packed)` as an operator, for torch.compile, which has to know [rows, cols] and dtype beforehand.

    Raises KernelError when the packed matrix has others.
    """
    return _dense_operator(packed, rows, cols, dtype)


def _run_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    record = record_of(packed)
    if (rows, cols, dtype) != (record.rows, record.cols, record.dtype):
        raise KernelError(
            f"the packed matrix is {name(record.dtype)} [{record.rows}, {record.cols}], the call says "
            f"{name(dtype)} [{rows}, {cols}]"
        )
    return dense(packed)


def _fake_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((rows, cols), dtype=dtype)


_dense_operator = operator(
    "bitmask_dense(Tensor packed, int rows, int cols, ScalarType dtype) -> Tensor", _run_dense, _fake_dense
)


def _run(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    record = record_of(packed)
    if rows != record.rows:
        raise KernelError(f"the packed matrix has {record.rows} rows, the call says {rows}")
    batch = check_rows(x, record.cols, record.dtype, record.device)
    which = choose(x.device.type)
    if which == "triton":
        from . import triton

        return triton.bitmask_gemv(x, batch, packed, record)
    tier = current() if which == "cpu" else None
    if tier is None:
        return reference.bitmask_gemv(x, packed)
    return cpu.bitmask_gemv(tier, x, batch, packed, record)


def _fake(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_operator = operator("bitmask_gemv(Tensor x, Tensor packed, int rows) -> Tensor", _run, _fake)
