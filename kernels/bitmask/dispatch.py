"""Bit-packed masks and kept values: the public names. Compiled code on the CPU, plain torch elsewhere or without it.

Layout and definition: `reference`. Every argument is checked here, so neither implementation sees a size that does not
fit.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import check_memory
from ..extension import compiled
from . import cpu, reference


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 [r, ceil(c / 8)] of a bool mask [r, c]: bit j of byte k is column 8k + j, unused bits are 0.

    Raises KernelError for another dtype or another number of dimensions.
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise KernelError(f"a mask must be bool [rows, cols], got {mask.dtype} {list(mask.shape)}")
    module = _module(mask)
    return reference.pack_bits(mask) if module is None else cpu.pack_bits(module, mask.contiguous())


def unpack_bits(bits: Tensor, cols: int) -> Tensor:
    """bool [r, cols] of packed bits uint8 [r, ceil(cols / 8)]. Bits beyond `cols` are ignored."""
    _check_bits(bits, cols)
    module = _module(bits)
    return reference.unpack_bits(bits, cols) if module is None else cpu.unpack_bits(module, bits.contiguous(), cols)


def row_counts(bits: Tensor) -> Tensor:
    """Number of set bits of each row of uint8 [r, b], int64 [r]."""
    if bits.dtype != torch.uint8 or bits.dim() != 2:
        raise KernelError(f"packed bits must be uint8 [rows, bytes], got {bits.dtype} {list(bits.shape)}")
    module = _module(bits)
    return reference.row_counts(bits) if module is None else cpu.row_counts(module, bits.contiguous())


def compress(weight: Tensor, bits: Tensor) -> Tensor:
    """Kept entries [nnz] of weight [r, c] in row order, bit for bit, in its dtype.

    Raises KernelError when the bits do not fit the weight or are set beyond its last column.
    """
    if weight.dim() != 2 or weight.is_complex():
        raise KernelError(f"a weight must be a real [rows, cols], got {weight.dtype} {list(weight.shape)}")
    _check_bits(bits, weight.shape[1])
    if bits.shape[0] != weight.shape[0]:
        raise KernelError(f"bits of {bits.shape[0]} rows do not fit a weight of {weight.shape[0]} rows")
    _check_tail(bits, weight.shape[1])
    module = _module(weight, bits)
    if module is None:
        return reference.compress(weight, bits)
    return cpu.compress(module, weight.detach().contiguous(), bits.contiguous(), int(row_counts(bits).sum()))


def expand(values: Tensor, bits: Tensor, cols: int) -> Tensor:
    """weight [r, cols] with `values` [nnz] where bits are set, in row order, and +0.0 elsewhere; inverse of `compress`.

    Raises KernelError when the number of values is not the number of set bits, or bits are set beyond `cols`.
    """
    check_values(values, bits, cols)
    module = _module(values, bits)
    if module is None:
        return reference.expand(values, bits, cols)
    return cpu.expand(module, values.detach().contiguous(), bits.contiguous(), cols)


def check_values(values: Tensor, bits: Tensor, cols: int) -> None:
    """Raises KernelError unless there is one of `values` [nnz] for every set bit, and none is set beyond `cols`."""
    if values.dim() != 1 or values.is_complex():
        raise KernelError(f"values must be real [nnz], got {values.dtype} {list(values.shape)}")
    _check_bits(bits, cols)
    _check_tail(bits, cols)
    found = int(row_counts(bits).sum())
    if found != values.numel():
        raise KernelError(f"{values.numel()} values for {found} set bits")


def _module(*tensors: Tensor) -> ModuleType | None:
    """The compiled module where it can be used: all tensors on the CPU, with memory of their own."""
    devices = {tensor.device.type for tensor in tensors}
    if len(devices) > 1:
        raise KernelError(f"arguments on different devices: {', '.join(sorted(devices))}")
    if devices != {"cpu"}:
        return None
    check_memory(*tensors)
    return compiled()


def _check_bits(bits: Tensor, cols: int) -> None:
    width = -(-cols // 8)
    if bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != width:
        raise KernelError(f"bits of {cols} columns must be uint8 [rows, {width}], got {bits.dtype} {list(bits.shape)}")


def _check_tail(bits: Tensor, cols: int) -> None:
    if cols % 8 and bool((bits[:, -1] >> (cols % 8)).any()):
        raise KernelError(f"bits are set beyond column {cols - 1}")
