"""Packing records: what is known about a packed tensor, tied to the memory it was learnt from.

A kernel follows offsets that it reads from the tensor, so the whole tensor is checked before its address is passed for
the first time. That takes as long as reading it, so the result is kept, and every later call only compares memory,
address, length and version. `.to`, deepcopy, offload hooks and assign-load bring other memory, in-place writes another
version: then the check runs again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...errors import KernelError
from ..arguments import name
from ..extension import compiled
from . import layout


@dataclass(frozen=True)
class Record:
    """A packed tensor without fault. `memory` is a weak reference; while it lives, no other memory gets its number."""

    rows: int
    cols: int
    nnz: int
    dtype: torch.dtype
    device: torch.device
    memory: StorageWeakRef
    address: int
    size: int
    version: int


_records: dict[int, Record] = {}
_next_sweep = 64


def record_of(packed: Tensor) -> Record:
    """The record of a packed tensor of 16-bit values, checked anew if need be. KernelError names what is wrong."""
    record = _record(packed)
    if record.dtype is torch.int8:
        raise KernelError(
            "the packed matrix has int8 values, bfloat16 or float16 ones are needed", hint="use int8_gemv"
        )
    return record


def int8_record_of(packed: Tensor) -> Record:
    """The same for a packed tensor of int8 values and scales."""
    record = _record(packed)
    if record.dtype is not torch.int8:
        raise KernelError(
            f"the packed matrix has {name(record.dtype)} values, int8 ones are needed", hint="use bitmask_gemv"
        )
    return record


def _record(packed: Tensor) -> Record:
    record = _records.get(packed.untyped_storage()._cdata)
    if (
        record is not None
        and record.address == packed.data_ptr()
        and record.size == packed.numel()
        and record.version == _version(packed)
        and packed.dtype is torch.uint8
        and packed.is_contiguous()
    ):
        return record
    return _learn(packed)


def _learn(packed: Tensor) -> Record:
    global _next_sweep
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise KernelError(
            f"a packed matrix is uint8 [size], contiguous; got {packed.dtype} {list(packed.shape)} with strides "
            f"{packed.stride()}"
        )
    if packed.data_ptr() % 8:
        raise KernelError("a packed matrix must begin at a multiple of 8 bytes", hint="clone the tensor")
    version = _version(packed)
    _check(packed)
    header = layout.read_header(packed)
    memory = StorageWeakRef(packed.untyped_storage())
    record = Record(
        rows=header["rows"],
        cols=header["cols"],
        nnz=header["nnz"],
        dtype=layout.DTYPES[header["dtype"]],
        device=packed.device,
        memory=memory,
        address=packed.data_ptr(),
        size=packed.numel(),
        version=version,
    )
    if len(_records) >= _next_sweep:
        for key in [key for key, old in _records.items() if old.memory.expired()]:
            del _records[key]
        _next_sweep = 2 * len(_records) + 64
    _records[memory.cdata] = record
    return record


def _check(packed: Tensor) -> None:
    module = compiled() if packed.is_cpu else None
    if module is not None:
        fault = module.tiles_fault(packed.data_ptr(), packed.numel())
    else:
        try:
            layout.check(packed.cpu())
            fault = None
        except layout.Fault as error:
            fault = str(error)
    if fault is not None:
        raise KernelError(f"malformed packed matrix of {packed.numel()} bytes: {fault}")


def _version(packed: Tensor) -> int:
    """Counts writes. Tensors made in inference mode have no count, and the error for asking takes 40 microseconds."""
    return -1 if packed.is_inference() else packed._version
