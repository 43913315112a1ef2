"""Which entries of a matrix are large, and how large its channels are: the public names.

Compiled code for float32 on CPUs, else torch. How many entries there are depends on the numbers, so these are no
operators of torch.library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_memory, name
from ..backend import choose
from ..tier import Tier, current
from . import reference


def channel_squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(sums of squares of the rows [rows], of the columns [cols]) of a float matrix [rows, cols], in float32.

    The same bits for any number of threads. Raises KernelError for what is no float matrix.
    """
    _check(matrix)
    tier = _tier(matrix)
    if tier is None:
        return reference.channel_squares(matrix)
    matrix, (rows, cols) = matrix.contiguous(), matrix.shape
    row_sums, col_sums = matrix.new_empty(rows), matrix.new_empty(cols)
    room = matrix.new_empty(tier.module.square_room(rows, cols))
    tier.module.channel_squares(
        tier.address, matrix.data_ptr(), rows, cols, room.data_ptr(), row_sums.data_ptr(), col_sums.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return row_sums, col_sums


def entries_beyond(matrix: Tensor, floor: float, weights: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(positions, values) of all entries v with |v w| > floor, row by row; what is not a number is none of them.

    Args:
        matrix: [rows, cols], float.
        weights: (r [rows], c [cols]), w of an entry is r_i c_j; 1 without.

    Returns:
        i * cols + j, int64 [K], and v w, [K]: v c_j, rounded, times r_i. The same bits from compiled code and torch.

    Raises:
        KernelError: what is no float matrix, or weights that do not fit it.
    """
    _check(matrix, *(weights or ()))
    if weights is not None and [weight.shape for weight in weights] != [(size,) for size in matrix.shape]:
        raise KernelError(
            f"weights have shapes {[list(weight.shape) for weight in weights]}, the matrix {list(matrix.shape)}; "
            "allowed: [rows] and [cols]"
        )
    tier = _tier(matrix, *(weights or ()))
    if tier is None:
        return reference.entries_beyond(matrix, floor, weights)
    matrix, (rows, cols) = matrix.contiguous(), matrix.shape
    held = tuple(weight.contiguous() for weight in weights or ())
    call = (
        tier.address, matrix.data_ptr(), rows, cols, *([weight.data_ptr() for weight in held] or (0, 0)), floor,
    )  # fmt: skip
    starts, threads = torch.empty(rows + 1, dtype=torch.int64), torch.get_num_threads()
    count = tier.module.count_entries(*call, starts.data_ptr(), threads)
    position, value = torch.empty(count, dtype=torch.int64), matrix.new_empty(count)
    tier.module.find_entries(*call, starts.data_ptr(), position.data_ptr(), value.data_ptr(), threads)
    return position, value


def _tier(*tensors: Tensor) -> Tier | None:
    fits = all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return current() if fits and choose("cpu") == "cpu" else None


def _check(matrix: Tensor, *weights: Tensor) -> None:
    for what, tensor in (("matrix", matrix), *(("weights", weight) for weight in weights)):
        if not tensor.is_floating_point():
            raise KernelError(f"{what} is {name(tensor.dtype)}, it must be of a float dtype")
        if tensor.device != matrix.device:
            raise KernelError(f"{what} is on {tensor.device}, matrix on {matrix.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise KernelError(f"{what} requires a gradient, and this has none", hint="run under torch.no_grad()")
    if matrix.dim() != 2:
        raise KernelError(f"matrix has shape {list(matrix.shape)}, allowed: [rows, cols]")
    check_memory(matrix, *weights)
