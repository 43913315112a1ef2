"""Products with a sparse matrix in CSR for training: the public names. Compiled code for float32 on CPUs, else torch.

A matrix S [rows, cols] is `rowptr` int32 [rows + 1] and `columns` int32 [K], row by row, with values [K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_memory, name
from ..backend import choose
from ..library import operator
from ..tier import Tier, current
from . import reference


def densest(device: str) -> float:
    """The density up to which these products, float32, beat dense ones on a device; 0 is never.

    Measured on Zen 3 with AVX2, two threads, 1024 and 2048 wide, 256 and 1024 rows: vector tiers up to more than 0.1,
    portable code and torch with MKL up to more than 0.03.
    """
    if device != "cpu":
        return 0.0
    tier = _tier(torch.float32, device)
    if tier is None:
        return 0.03 if torch.backends.mkl.is_available() else 0.0
    return 0.03 if tier.name == "scalar" else 0.1


def csr_linear(x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """x [tokens, cols] S^T: [tokens, rows] in x's dtype, which is that of the values.

    Each token has the same bits alone or among others, for any number of threads. Raises KernelError for shapes, dtypes
    and devices that do not fit, positions beyond the matrix (compiled code only) and where a gradient is required.
    """
    run = _linear_operator if torch.compiler.is_compiling() else _linear
    return run(x, rowptr, columns, values)


def csr_sampled(gy: Tensor, x: Tensor, rowptr: Tensor, columns: Tensor) -> Tensor:
    """gy^T x at the positions of S alone, [K]; gy [tokens, rows] and x [tokens, cols] of one dtype.

    The same bits for any number of threads. Raises KernelError as `csr_linear` does.
    """
    run = _sampled_operator if torch.compiler.is_compiling() else _sampled
    return run(gy, x, rowptr, columns)


def _linear(x: Tensor, rowptr: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    rows = _checked(rowptr, columns, {"x": x, "values": values})
    if x.dim() != 2 or values.shape != columns.shape:
        raise KernelError(
            f"x has shape {list(x.shape)}, values {list(values.shape)}; a matrix and [{len(columns)}] are allowed"
        )
    tier = _tier(x.dtype, x.device.type)
    if tier is None:
        return reference.csr_linear(x, rowptr, columns, values)
    x, values, y = x.contiguous(), values.contiguous(), x.new_empty(x.shape[0], rows)
    good = tier.module.csr_linear(
        tier.address, rowptr.data_ptr(), columns.data_ptr(), rows, x.shape[1], len(columns), values.data_ptr(),
        x.data_ptr(), x.shape[0], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return _good(good, y, rows, x.shape[1])


def _sampled(gy: Tensor, x: Tensor, rowptr: Tensor, columns: Tensor) -> Tensor:
    rows = _checked(rowptr, columns, {"gy": gy, "x": x})
    if gy.dim() != 2 or x.dim() != 2 or gy.shape != (x.shape[0], rows):
        raise KernelError(
            f"gy has shape {list(gy.shape)}, x {list(x.shape)}; allowed: [tokens, {rows}], [tokens, cols]"
        )
    tier = _tier(x.dtype, x.device.type)
    if tier is None:
        return reference.csr_sampled(gy, x, rowptr, columns)
    gy, x = gy.contiguous(), x.contiguous()
    tokens, cols = x.shape
    made = x.new_empty(len(columns))
    room = x.new_empty(tier.module.csr_room(tokens, rows, cols))
    good = tier.module.csr_sampled(
        tier.address, rowptr.data_ptr(), columns.data_ptr(), rows, cols, len(columns), gy.data_ptr(), x.data_ptr(),
        tokens, room.data_ptr(), made.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return _good(good, made, rows, cols)


def _tier(dtype: torch.dtype, device: str) -> Tier | None:
    return current() if dtype is torch.float32 and device == "cpu" and choose("cpu") == "cpu" else None


def _checked(rowptr: Tensor, columns: Tensor, operands: dict[str, Tensor]) -> int:
    """The number of rows."""
    (first, one), (second, other) = operands.items()
    if one.dtype is not other.dtype or not one.is_floating_point():
        raise KernelError(
            f"{first} is {name(one.dtype)}, {second} {name(other.dtype)}; both must be of one float dtype"
        )
    for what, index in (("rowptr", rowptr), ("columns", columns)):
        if index.dtype is not torch.int32 or index.dim() != 1 or not index.is_contiguous():
            raise KernelError(f"{what} is {name(index.dtype)} {list(index.shape)}, it must be contiguous int32 [n]")
    if len({tensor.device for tensor in (one, other, rowptr, columns)}) > 1:
        raise KernelError(f"{first} is on {one.device}, {second} on {other.device}, rowptr on {rowptr.device}")
    if not len(rowptr):
        raise KernelError("rowptr is empty, it has one number more than the matrix has rows")
    if torch.is_grad_enabled() and (one.requires_grad or other.requires_grad):
        raise KernelError("a gradient is required, and these products have none", hint="run under torch.no_grad()")
    check_memory(one, other, rowptr, columns)
    return len(rowptr) - 1


def _good(good: bool, made: Tensor, rows: int, cols: int) -> Tensor:
    if not good:
        raise KernelError(
            f"rowptr does not rise from 0 to the number of columns, or a column lies beyond a [{rows}, {cols}] matrix"
        )
    return made


_linear_operator = operator(
    "csr_linear(Tensor x, Tensor rowptr, Tensor columns, Tensor values) -> Tensor",
    _linear,
    lambda x, rowptr, columns, values: x.new_empty(x.shape[0], rowptr.shape[0] - 1),
)
_sampled_operator = operator(
    "csr_sampled(Tensor gy, Tensor x, Tensor rowptr, Tensor columns) -> Tensor",
    _sampled,
    lambda gy, x, rowptr, columns: x.new_empty(columns.shape[0]),
)
