"""Packing records of bitmask matrices: checked in C++ where it is there, else by `layout`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import name
from ..extension import compiled
from ..record import Record, Records
from . import layout

__all__ = ["Record", "int8_record_of", "record_of", "records"]


def record_of(packed: Tensor) -> Record:
    """The record of a packed tensor of 16-bit values, checked anew if need be. KernelError names what is wrong."""
    record = records.of(packed)
    if record.dtype is torch.int8:
        raise KernelError(
            "the packed matrix has int8 values, bfloat16 or float16 ones are needed", hint="use int8_gemv"
        )
    return record


def int8_record_of(packed: Tensor) -> Record:
    """The same for a packed tensor of int8 values and scales."""
    record = records.of(packed)
    if record.dtype is not torch.int8:
        raise KernelError(
            f"the packed matrix has {name(record.dtype)} values, int8 ones are needed", hint="use bitmask_gemv"
        )
    return record


def _fault(packed: Tensor) -> str | None:
    host = packed.cpu()
    module = compiled()
    if module is not None:
        return module.tiles_fault(host.data_ptr(), host.numel())
    try:
        layout.check(host)
    except layout.Fault as error:
        return str(error)
    return None


records = Records(lambda packed: _fault(packed), layout.read_header, layout.DTYPES)
