"""Memory for weights that a kernel reads from end to end, and for caches that grow."""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

from .extension import compiled

HUGE = 1 << 21
SMALL = 1 << 16


def empty_weight(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, in pages of 2 MiB where the system gives them.

    They are given only where nothing has been written yet. What torch allocates below 32 MiB is mostly memory that was
    used before, in pages of 4 KiB, so this is memory of its own, freed with the tensor. On a virtual machine, where a
    page that is looked up costs twice, one thread read 8 MiB 1.1 to 1.5 times as fast as from torch's.
    """
    size = math.prod(shape) * dtype.itemsize
    module = compiled()
    if module is None or size < HUGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device="cpu")
    region = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE
    tensor = torch.frombuffer(region, dtype=dtype, count=size // dtype.itemsize, offset=first).view(shape)
    module.prefer_huge_pages(tensor.data_ptr(), size)
    return tensor


def zeros_apart(*shape: int, dtype: torch.dtype) -> Tensor:
    """A CPU tensor of zeros whose memory goes back to the system as soon as it is freed.

    glibc keeps freed blocks of up to 32 MiB as holes in its heap: a cache that grows by moving to a larger tensor would
    hold twice its size after a while. Pages that nobody has written take no memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL or sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype, device="cpu")
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(region, dtype=dtype).view(shape)
