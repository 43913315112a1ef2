"""`bitmask_gemv` for GPUs, from the packed tensor that the CPU reads. `dispatch` has checked the arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import add_product, finish, fold, narrow, on_device, warps
from ..gpu_plan import Plan, cut, power_of_two
from .gpu_layout import index_of
from .layout import Shape
from .record import Record

TILES = 8  # side by side in a step: 4 warps of 2 x 16 threads, each thread 8 columns of 4 rows


def plan(shape: Shape) -> Plan:
    """Steps over tiles of a row tile, one program for each."""
    return cut(sum(shape.panels), TILES, shape.row_tiles)


@triton.jit
def _row_tile(
    x: tl.tensor,
    packed: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    stream: tl.tensor,
    tiles: tl.tensor,
    share: tl.tensor,
    batch: tl.tensor,
    BATCH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """out [splits, batch, rows], float32 or, of one split, the result: four rows over one split of the columns.

    A thread owns a mask byte, 8 columns, of each of the 4 rows. Where its values begin: begin of the tile, values of
    the rows before, values under the mask bytes before its own (a prefix sum over 16 neighbours).
    """
    row_tile, split = tl.program_id(0), tl.program_id(1)
    row, b = tl.arange(0, 4), tl.arange(0, BATCH)
    # Not in pairs: two mask bytes in one thread would send every value through shared memory.
    byte = tl.max_contiguous(tl.arange(0, 16), 1)
    masks = packed + stream
    values = masks.to(tl.pointer_type(x.dtype.element_ty), bitcast=True)
    sums = tl.zeros((BATCH, 4, TILES, 16), tl.float32)
    end = tl.minimum((split + 1) * share, tiles)
    for first in range(split * share, end, TILES):
        tile = first + tl.arange(0, TILES)
        entry = tl.load(index + row_tile.to(tl.int64) * tiles + tile, mask=tile < end, other=0)
        start = (entry >> 27)[None, :, None]
        ahead = ((entry << 9)[None, :, None] >> (9 * row)[:, None, None]) & 511
        inside = (tile < end)[None, :, None]
        bits = tl.load(masks + 2 * start + (16 * row)[:, None, None] + byte, mask=inside, other=0).to(tl.int32)
        pairs = bits - ((bits >> 1) & 0x55)
        nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        count = (nibbles + (nibbles >> 4)) & 0x0F
        place = values + (start + 32) + (ahead + tl.cumsum(count, 2) - count)
        column = (tile * 128)[None, :, None] + 8 * byte
        for k in tl.static_range(8):
            kept = (bits & (1 << k)) != 0
            value = tl.load(place, mask=kept, other=0.0).to(tl.float32)
            place += kept.to(tl.int32)
            wanted = (b[:, None, None] < batch) & (column + k < cols)
            factor = tl.load(x + b[:, None, None] * cols + column + k, mask=wanted, other=0.0).to(tl.float32)
            sums = add_product(sums, value[None, :, :, :], factor[:, None, :, :])
    total = tl.reshape(fold(sums, BATCH * 4, TILES * 16, 1), (BATCH, 4))
    here = row_tile * 4 + row
    to = (split * batch + b).to(tl.int64)[:, None] * rows + here
    tl.store(out + to, narrow(total, out.dtype.element_ty), mask=(b[:, None] < batch) & (here < rows))


def bitmask_gemv(x: Tensor, batch: int, packed: Tensor, record: Record) -> Tensor:
    """x [..., in] times the packed matrix transposed: the same bits for a row alone or among others, on every GPU."""
    y = x.new_empty((*x.shape[:-1], record.rows))
    shape = Shape(record.rows, record.cols)
    if not y.numel():
        return y
    chosen, tiles = plan(shape), sum(shape.panels)
    single = chosen.splits == 1
    out = y if single else x.new_empty(chosen.splits, y.numel(), dtype=torch.float32)
    with on_device(x):
        _row_tile[(shape.row_tiles, chosen.splits)](
            x,
            packed,
            index_of(packed, record),
            out,
            record.rows,
            record.cols,
            shape.stream,
            tiles,
            chosen.share * chosen.width,
            batch,
            BATCH=power_of_two(batch),
            TILES=chosen.width,
            num_warps=warps(batch),
        )
        return y if single else finish(out, y)
