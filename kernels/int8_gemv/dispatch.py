"""Bitmask matrix of int8 values and scales times 1 to 8 vectors: the public names. C++ on the CPU, else plain torch.

A matrix is one uint8 tensor, as for `bitmask_gemv`, whose layout and record it shares. `reference` defines the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import CODES, check_rows, name
from ..backend import choose, missing
from ..bitmask import dispatch as bitmask
from ..bitmask_gemv import cpu as tiles
from ..bitmask_gemv import layout
from ..bitmask_gemv.record import Record, int8_record_of
from ..extension import compiled
from ..library import operator
from ..tier import current
from . import cpu, reference

GROUP = reference.GROUP


def pack(bits: Tensor, values: Tensor, scales: Tensor, cols: int) -> Tensor:
    """The machine layout, uint8 [size], on the CPU. Lossless: `unpack` gives all three back bit for bit.

    bits: uint8 [rows, ceil(cols / 8)]; values: int8 [nnz] in row order; scales: float16 [rows, ceil(cols / 128)], one
    per row and 128 columns, finite and not negative. Raises KernelError when they do not fit.
    """
    if values.dtype is not torch.int8 or scales.dtype is not torch.float16:
        raise KernelError(
            f"values are {name(values.dtype)} and scales {name(scales.dtype)}, they must be int8 and float16"
        )
    if not (bits.is_cpu and values.is_cpu and scales.is_cpu):
        raise KernelError(
            f"bits are on {bits.device}, values on {values.device}, scales on {scales.device}; packing takes all three "
            "on the CPU"
        )
    bitmask.check_values(values, bits, cols)
    shape = (bits.shape[0], -(-cols // GROUP))
    if scales.shape != shape:
        raise KernelError(
            f"scales have shape {list(scales.shape)}, a matrix {[bits.shape[0], cols]} needs {list(shape)}"
        )
    bits, values, scales = bits.contiguous(), values.contiguous(), scales.detach().contiguous()
    patterns = scales.view(torch.int16)
    if ((patterns < 0) | (patterns >= 0x7C00)).any():
        raise KernelError("a scale is negative or not finite", hint="scales are sizes; signs belong to the values")
    module = compiled()
    return layout.pack(bits, values, cols, scales) if module is None else tiles.pack(module, bits, values, cols, scales)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(bits [rows, ceil(cols / 8)], values [nnz], scales [rows, ceil(cols / 128)], cols) on the CPU: undoes `pack`."""
    packed = packed.detach().cpu()
    record = int8_record_of(packed)
    module = compiled()
    if module is None:
        bits, values, cols = layout.unpack(packed)
        return bits, values, layout.unpack_scales(packed), cols
    rows, cols, groups = record.rows, record.cols, -(-record.cols // GROUP)
    bits, values, scales = tiles.unpack(module, packed, rows, cols, record.nnz, record.dtype, groups)
    return bits, values, scales, cols


def dense(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, cols], dtype(float32(value) * float32(scale)) and +0.0 elsewhere, on the tensor's device."""
    if dtype not in CODES:
        raise KernelError(f"the dense matrix cannot be {name(dtype)}, allowed: {', '.join(map(name, CODES))}")
    bits, values, scales, cols = unpack(packed)
    return reference.dequantise(bitmask.expand(values, bits, cols), scales, dtype).to(packed.device)


def describe(packed: Tensor) -> Record:
    """Rows, columns, kept values and dtype (int8) of a packed matrix. Raises KernelError, naming what is wrong."""
    return int8_record_of(packed)


def int8_gemv(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    """x [..., in] times the packed matrix [rows, in] transposed: [..., rows] in x's dtype, sums in float32.

    x: bfloat16, float16 or float32, contiguous, 1 to 8 rows; it is quantised to int8 in groups of 128 columns. The
    same bits from every implementation, for any number of threads, and for a row alone or among others. An infinity or
    NaN in a row of x makes all its outputs NaN. Raises KernelError for what does not fit, a malformed matrix, and where
    a gradient would be needed.
    """
    return _operator(x, packed, rows)


def int8_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """`dense(packed, dtype)` as an operator, for torch.compile, which has to know [rows, cols] beforehand.

    Raises KernelError when the packed matrix has others.
    """
    return _dense_operator(packed, rows, cols, dtype)


def _run_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    record = int8_record_of(packed)
    if (rows, cols) != (record.rows, record.cols):
        raise KernelError(f"the packed matrix is [{record.rows}, {record.cols}], the call says [{rows}, {cols}]")
    return dense(packed, dtype)


def _fake_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((rows, cols), dtype=dtype)


_dense_operator = operator(
    "int8_dense(Tensor packed, int rows, int cols, ScalarType dtype) -> Tensor", _run_dense, _fake_dense
)


def _run(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    record = int8_record_of(packed)
    if rows != record.rows:
        raise KernelError(f"the packed matrix has {record.rows} rows, the call says {rows}")
    if x.dtype not in CODES:
        raise KernelError(f"x is {name(x.dtype)}, allowed: {', '.join(map(name, CODES))}")
    batch = check_rows(x, record.cols, x.dtype, record.device)
    which = choose(x.device.type)
    if which == "triton":
        missing("int8_gemv")
    tier = current() if which == "cpu" else None
    if tier is None:
        bits, values, scales, cols = unpack(packed)
        return reference.int8_gemv(x, bits.to(x.device), values.to(x.device), scales.to(x.device), cols)
    return cpu.int8_gemv(tier, x, batch, packed, rows)


def _fake(x: Tensor, packed: Tensor, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_operator = operator("int8_gemv(Tensor x, Tensor packed, int rows) -> Tensor", _run, _fake)
