"""Dual sparsity, inactive inputs over a sparse matrix: the public names. Compiled code on the CPU, else plain torch.

A matrix is one uint8 tensor, made by `pack` from the layout of checkpoints. It can be moved, copied and saved like any
tensor; its content is checked when it is first used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..active.cpu import active_gemv
from ..arguments import check_bias, check_rows, check_threshold, name
from ..backend import choose
from ..bitmask import dispatch as bitmask
from ..extension import compiled
from ..library import operator
from ..tier import current
from . import cpu, layout, reference
from .record import Record, record_of


def pack(bits: Tensor, values: Tensor, cols: int) -> Tensor:
    """The machine layout, uint8 [size], of row bits [rows, ceil(cols / 8)] and values [nnz] in row order, on the CPU.

    values: bfloat16 or float16. Lossless: `unpack` gives both back bit for bit. Raises KernelError when they do not
    fit, and for more than 4 GiB of masks and values.
    """
    if values.dtype not in layout.CODES:
        allowed = " and ".join(map(name, layout.CODES))
        raise KernelError(f"values are {name(values.dtype)}, allowed: {allowed}", hint="convert the weight to bfloat16")
    if not (bits.is_cpu and values.is_cpu):
        raise KernelError(f"bits are on {bits.device}, values on {values.device}; packing takes both on the CPU")
    bitmask.check_values(values, bits, cols)
    if not layout.Shape(bits.shape[0], cols).fits(values.numel()):
        raise KernelError(
            f"a matrix [{bits.shape[0]}, {cols}] with {values.numel()} values takes more than 4 GiB",
            hint="pack ranges of its rows",
        )
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
    bits, values = cpu.unpack(module, packed, record.rows, record.cols, record.nnz, record.dtype)
    return bits, values, record.cols


def dense(packed: Tensor) -> Tensor:
    """The matrix [out, in] with +0.0 where nothing is kept, on the packed tensor's device: a view of its transpose."""
    host = packed.detach().cpu()
    record, tier = record_of(host), current()
    if tier is not None:
        return cpu.dense_t(tier, host, record.rows, record.cols, record.dtype).to(packed.device).t()
    bits, values, cols = unpack(packed)
    return bitmask.expand(values, bits, cols).t().contiguous().to(packed.device).t()


def describe(packed: Tensor) -> Record:
    """Rows, columns, kept values and dtype of a packed matrix. Raises KernelError, naming what is wrong with it."""
    return record_of(packed)


def dual_gemv(x: Tensor, packed: Tensor, threshold: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the packed matrix [rows, in] transposed over the active inputs only: [..., rows] in x's dtype.

    Input i of a row is active unless |x_i| <= threshold_i (float32 [in]), exactly as in `channel_gemv`; a channel is
    read when any row of x needs it. Sums in float32, from `bias` [rows] in x's dtype on, or from zero. x: the dtype of
    the values, contiguous, 1 to 8 rows. The same bits for any number of threads, and for a row alone or among others.
    Raises KernelError for what does not fit, a malformed matrix, and where a gradient would be needed.

    In channels that are read, pruned entries multiply as +0.0: an active infinity or NaN in x makes NaN of them.
    Weights should be finite: an infinite or NaN weight that is read for one row makes NaN of all rows.
    """
    return _operator(x, packed, threshold, rows, bias)


def dual_dense(packed: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
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
    return packed.new_empty((cols, rows), dtype=dtype).t()


_dense_operator = operator(
    "dual_dense(Tensor packed, int rows, int cols, ScalarType dtype) -> Tensor", _run_dense, _fake_dense
)


def _run(x: Tensor, packed: Tensor, threshold: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    record = record_of(packed)
    if rows != record.rows:
        raise KernelError(f"the packed matrix has {record.rows} rows, the call says {rows}")
    batch = check_rows(x, record.cols, record.dtype, record.device)
    check_threshold(threshold, record.cols, x.device)
    check_bias(bias, rows, x)
    which = choose(x.device.type)
    if which == "triton":
        from . import triton
        from .gpu_layout import matrix_of

        return triton.dual_gemv(x, batch, matrix_of(packed, record, unpack), threshold, rows, bias)
    tier = current() if which == "cpu" else None
    if tier is None:
        return reference.dual_gemv(x, packed, threshold, bias)
    return active_gemv(tier, x, threshold, [packed], [rows], [bias])[0][0]


def _fake(x: Tensor, packed: Tensor, threshold: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_operator = operator(
    "dual_gemv(Tensor x, Tensor packed, Tensor threshold, int rows, Tensor? bias=None) -> Tensor", _run, _fake
)
