"""Packing records: what is known about a packed tensor, tied to the memory it was learnt from.

A kernel follows offsets that it reads from the tensor, so the whole tensor is checked before its address is passed for
the first time. That takes as long as reading it, so the result is kept, and every later call only compares memory,
address, length and version. `.to`, deepcopy, offload hooks and assign-load bring other memory, in-place writes another
version: then the check runs again. Writes that torch does not count, those by way of `.data` and into tensors made in
inference mode, are not seen: whoever makes them must leave a well-formed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import KernelError


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


class Records:
    """The packed tensors of one layout that have been checked."""

    def __init__(
        self,
        fault: Callable[[Tensor], str | None],
        header: Callable[[Tensor], dict[str, int]],
        dtypes: dict[int, torch.dtype],
    ) -> None:
        """fault: what is wrong with a uint8 tensor [size], or None. header: of one without fault, its "rows", "cols",
        "nnz" and "dtype", a key of `dtypes`."""
        self._fault, self._header, self._dtypes = fault, header, dtypes
        self._known: dict[int, Record] = {}
        self._next_sweep = 64
        self._lock = Lock()  # several threads may run models, and what they learn comes here

    def __len__(self) -> int:
        return len(self._known)

    def of(self, packed: Tensor) -> Record:
        """The record of a packed tensor, checked anew if need be. Raises KernelError, naming what is wrong with it."""
        record = self._known.get(packed.untyped_storage()._cdata)
        if (
            record is not None
            and record.address == packed.data_ptr()
            and record.size == packed.numel()
            and record.version == _version(packed)
            and packed.dtype is torch.uint8
            and packed.is_contiguous()
        ):
            return record
        return self._learn(packed)

    def _learn(self, packed: Tensor) -> Record:
        if packed.dtype is not torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
            raise KernelError(
                f"a packed matrix is uint8 [size], contiguous; got {packed.dtype} {list(packed.shape)} with strides "
                f"{packed.stride()}"
            )
        if packed.data_ptr() % 8:
            raise KernelError("a packed matrix must begin at a multiple of 8 bytes", hint="clone the tensor")
        version = _version(packed)
        fault = self._fault(packed)
        if fault is not None:
            raise KernelError(f"malformed packed matrix of {packed.numel()} bytes: {fault}")
        header = self._header(packed)
        memory = StorageWeakRef(packed.untyped_storage())
        record = Record(
            rows=header["rows"],
            cols=header["cols"],
            nnz=header["nnz"],
            dtype=self._dtypes[header["dtype"]],
            device=packed.device,
            memory=memory,
            address=packed.data_ptr(),
            size=packed.numel(),
            version=version,
        )
        with self._lock:
            if len(self._known) >= self._next_sweep:
                for key in [key for key, old in self._known.items() if old.memory.expired()]:
                    del self._known[key]
                self._next_sweep = 2 * len(self._known) + 64
            self._known[memory.cdata] = record
        return record


def _version(packed: Tensor) -> int:
    """Counts writes. Tensors made in inference mode have no count, and the error for asking takes 40 microseconds."""
    return -1 if packed.is_inference() else packed._version
