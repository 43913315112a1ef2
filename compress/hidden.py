"""Hidden states of all calibration or evaluation windows, in memory up to a limit and in one file beyond it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ResourceError
from .failpoint import failpoint


class HiddenStore:
    """One tensor per window, all of one shape [1, length, width] and dtype.

    The first windows that fit into `memory_bytes` stay in memory, the others live at fixed offsets of the file `path`,
    which is created when first needed and removed by `close`. Reads return tensors that the caller may change.
    """

    def __init__(self, path: Path, memory_bytes: int) -> None:
        self.path = path
        self.memory_bytes = memory_bytes
        self._memory: dict[int, Tensor] = {}
        self._spilled: set[int] = set()
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._memory) + len(self._spilled)

    @property
    def record_bytes(self) -> int:
        """Bytes of one window."""
        count = 1
        for size in self._shape:
            count *= size
        return count * self._dtype.itemsize

    def put(self, window: int, hidden: Tensor) -> None:
        """Store (or replace) the hidden state of `window`. ResourceError when the disk is full."""
        hidden = hidden.detach().cpu()
        if not self._shape:
            self._shape, self._dtype = tuple(hidden.shape), hidden.dtype
        if tuple(hidden.shape) != self._shape or hidden.dtype != self._dtype:
            raise ValueError(
                f"window {window}: {tuple(hidden.shape)} {hidden.dtype}, expected {self._shape} {self._dtype}"
            )
        if window in self._memory or (window not in self._spilled and self._fits()):
            self._memory[window] = hidden.clone()
        else:
            self._write(window, hidden.contiguous())

    def get(self, window: int) -> Tensor:
        """The hidden state of `window`, a tensor of its own."""
        if window in self._memory:
            return self._memory[window].clone()
        if window not in self._spilled or self._file is None:
            raise KeyError(window)
        buffer = bytearray(self.record_bytes)
        view, offset = memoryview(buffer), window * self.record_bytes
        while view:
            count = os.preadv(self._file, [view], offset)
            if count == 0:
                raise ResourceError(f"{self.path} is shorter than expected", hint="was it changed by another program?")
            view, offset = view[count:], offset + count
        return torch.frombuffer(buffer, dtype=self._dtype).reshape(self._shape)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._memory.clear()
        self._spilled.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self.path.unlink(missing_ok=True)

    def _fits(self) -> bool:
        return (len(self._memory) + 1) * self.record_bytes <= self.memory_bytes

    def _write(self, window: int, hidden: Tensor) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        view, offset = hidden.view(torch.uint8).flatten().numpy().data, window * self.record_bytes
        failpoint("spill")
        try:
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise ResourceError(
                f"hidden states cannot be spilled to {self.path}: {error.strerror}",
                hint="free disk space, or raise --max-memory",
            ) from error
        self._spilled.add(window)
