"""What the Triton kernels of all operations share: sums in a fixed order, rounding, the device to run on.

No postponed annotations in files with kernels: early versions of Triton want the object `tl.constexpr`, not its name.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def warps(batch: int) -> int:
    """Warps of a program. More for more rows, whose sums are held in registers; the result does not depend on it."""
    return 4 if batch <= 2 else 8


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one of x when a model lies on several."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@triton.jit
def fold(sums: tl.tensor, OUTER: tl.constexpr, LENGTH: tl.constexpr, INNER: tl.constexpr) -> tl.tensor:
    """[OUTER, LENGTH, INNER] in any shape of that order, added up over LENGTH, a power of two to 4096: [OUTER, INNER].

    Halves are added onto each other. A sum of two has the same bits in either order, so the result does not depend on
    where the compiler puts the elements, as that of one `tl.sum` would.
    """
    for step in tl.static_range(12):
        if (LENGTH >> step) > 1:
            sums = tl.sum(tl.reshape(sums, (OUTER, 2, (LENGTH >> (step + 1)) * INNER)), axis=1)
    return tl.reshape(sums, (OUTER, INNER))


@triton.jit
def add_product(sums: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """sums + a * b, rounded once: written out, because compilers differ in whether they fuse a product and a sum."""
    return tl.fma(tl.broadcast_to(a, sums.shape), tl.broadcast_to(b, sums.shape), sums)


@triton.jit
def narrow(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 rounded to the nearest DTYPE, ties to even. By hand for bfloat16: Triton's interpreter cuts bits off."""
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def add_splits(partial: tl.tensor, y: tl.tensor, size: tl.tensor, SPLITS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """partial float32 [SPLITS, size], added up in the order of the splits and rounded: y [size]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        place = tl.zeros((BLOCK,), tl.int64) + split  # as a tensor: a size of 1 is a constant, which has no width
        total += tl.load(partial + place * size + at, mask=at < size, other=0.0)
    tl.store(y + at, narrow(total, y.dtype.element_ty), mask=at < size)


def partial_sums(splits: int, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 [splits or one more, y.numel()] for `finish`, and the part for the sums: a bias is the first split."""
    partial = y.new_empty(splits + (bias is not None), y.numel(), dtype=torch.float32)
    if bias is None:
        return partial, partial
    partial[0].view(-1, bias.numel()).copy_(bias)
    return partial, partial[1:]


def finish(partial: Tensor, y: Tensor) -> Tensor:
    """y from float32 [splits, y.numel()]: what several programs found about the same outputs, in a second launch."""
    block, size = 128, y.numel()
    add_splits[(-(-size // block),)](partial, y, size, SPLITS=partial.shape[0], BLOCK=block, num_warps=4)
    return y
