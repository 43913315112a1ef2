"""Packing records of matrices packed for dual sparsity: checked in C++ where it is there, else by `layout`."""

from __future__ import annotations

from torch import Tensor

from ..extension import compiled
from ..record import Record, Records
from . import layout

__all__ = ["Record", "record_of", "records"]


def _fault(packed: Tensor) -> str | None:
    host = packed.cpu()
    module = compiled()
    if module is not None:
        return module.dual_fault(host.data_ptr(), host.numel())
    try:
        layout.check(host)
    except layout.Fault as error:
        return str(error)
    return None


records = Records(lambda packed: _fault(packed), layout.read_header, layout.DTYPES)
record_of = records.of
