"""N:M matrix times 1 to 8 vectors: the public names. Triton on GPUs, plain torch elsewhere.

There is no compiled code for processors: they gain nothing from the fixed stride, and `bitmask_gemv` runs N:M there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_rows, name
from ..backend import choose
from ..bitmask import dispatch as bitmask
from ..bitmask_gemv.layout import CODES
from ..library import operator
from . import reference

PATTERNS = ((1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (1, 8))  # one, two or four values under every byte of codes


def pack(bits: Tensor, values: Tensor, cols: int, keep: int, group: int) -> Tensor:
    """values with fixed stride, [rows, ceil(cols / 8) * 8 * keep / group], of row bits and values [nnz] in row order.

    The bits themselves are the codes. values: bfloat16 or float16. Groups may keep fewer than `keep` of `group`: their
    last slots hold +0.0. Raises KernelError when one keeps more.
    """
    _check_pattern(keep, group)
    _check_dtype(values)
    bitmask.check_values(values, bits, cols)
    more = reference.overfull(bits, keep, group)
    if more > 0:
        raise KernelError(
            f"a group of {group} keeps {keep + more} weights, {keep} are allowed", hint="bitmask_gemv takes any mask"
        )
    return reference.pack(bits, values.detach(), keep, group)


def unpack(codes: Tensor, values: Tensor, cols: int, keep: int, group: int) -> Tensor:
    """values [nnz] in row order: the inverse of `pack`."""
    _check_matrix(codes, values, cols, keep, group)
    if reference.overfull(codes, keep, group) > 0:
        raise KernelError(f"a group of {group} has more than {keep} bits")
    return reference.unpack(codes, values, keep, group)


def nm_gemv(x: Tensor, codes: Tensor, values: Tensor, keep: int, group: int) -> Tensor:
    """x [..., in] times the keep:group matrix [rows, in] transposed: [..., rows] in x's dtype, sums in float32.

    codes: row bits uint8 [rows, ceil(in / 8)]; values: of `pack`, in x's dtype. x: contiguous, 1 to 8 rows. Pruned
    entries multiply as +0.0: an infinity in x makes NaN. On a GPU, a row gives the same bits alone and among others.
    Raises KernelError for shapes, dtypes and devices that do not fit, and where a gradient would be needed. The content
    of codes is not checked, and need not be: no address follows from it. Of a group with too many bits, the first
    `keep` count.
    """
    return _operator(x, codes, values, keep, group)


def _run(x: Tensor, codes: Tensor, values: Tensor, keep: int, group: int) -> Tensor:
    cols = x.shape[-1] if x.dim() else 0
    _check_matrix(codes, values, cols, keep, group)
    batch = check_rows(x, cols, values.dtype, values.device)
    if choose(x.device.type) == "triton":
        from . import triton

        return triton.nm_gemv(x, batch, codes, values, keep, group)
    return reference.nm_gemv(x, codes, values, keep, group)


def _check_matrix(codes: Tensor, values: Tensor, cols: int, keep: int, group: int) -> None:
    _check_pattern(keep, group)
    _check_dtype(values)
    width = -(-cols // 8)
    if codes.device != values.device or not (codes.is_contiguous() and values.is_contiguous()):
        raise KernelError(f"codes on {codes.device} and values on {values.device} must be contiguous on one device")
    if codes.dtype is not torch.uint8 or codes.dim() != 2 or codes.shape[1] != width:
        raise KernelError(f"codes are {name(codes.dtype)} {list(codes.shape)}, x needs uint8 [rows, {width}]")
    expected = (codes.shape[0], width * 8 * keep // group)
    if values.shape != expected:
        raise KernelError(f"values have shape {list(values.shape)}, {keep}:{group} needs {list(expected)}")
    if values.data_ptr() % 8:
        raise KernelError("values must begin at a multiple of 8 bytes", hint="clone the tensor")


def _check_pattern(keep: int, group: int) -> None:
    if (keep, group) not in PATTERNS:
        allowed = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
        raise KernelError(f"{keep}:{group} has no fixed stride, allowed: {allowed}", hint="bitmask_gemv takes any mask")


def _check_dtype(values: Tensor) -> None:
    if values.dtype not in CODES:
        allowed = " and ".join(map(name, CODES))
        raise KernelError(f"values are {name(values.dtype)}, allowed: {allowed}", hint="convert the weight to bfloat16")


def _fake(x: Tensor, codes: Tensor, values: Tensor, keep: int, group: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_operator = operator("nm_gemv(Tensor x, Tensor codes, Tensor values, int keep, int group) -> Tensor", _run, _fake)
