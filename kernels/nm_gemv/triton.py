"""`nm_gemv` for GPUs. `dispatch` has checked the arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import add_product, finish, fold, narrow, on_device, warps
from ..gpu_plan import Plan, cut, power_of_two

ROWS = 4
LANES = 128  # bytes of codes in a step: one for each thread, in each of the rows


def plan(rows: int, width: int) -> Plan:
    """Steps over the `width` bytes of codes of a row, one program for 4 rows."""
    return cut(width, LANES, -(-rows // ROWS))


@triton.jit
def _rows(
    x: tl.tensor,
    codes: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    width: tl.tensor,
    share: tl.tensor,
    batch: tl.tensor,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """out [splits, batch, rows], float32 or, of one split, the result: four rows over one split of the columns.

    A thread owns a byte of codes, 8 columns, of each row. The values of that byte are one integer of 16, 32 or 64 bits
    at an address that is known beforehand: nothing waits for the codes.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    b, row = tl.arange(0, BATCH), block * ROWS + tl.arange(0, ROWS)
    line = row.to(tl.int64)[None, :, None] * width
    lane = tl.max_contiguous(tl.arange(0, LANES), 1)  # one byte for each thread, where its integer of values is
    sums = tl.zeros((BATCH, ROWS, LANES), tl.float32)
    end = tl.minimum((split + 1) * share, width)
    for first in range(split * share, end, LANES):
        byte = first + lane
        inside = (row < rows)[None, :, None] & (byte < end)
        code = tl.load(codes + line + byte, mask=inside, other=0).to(tl.int32)
        word = tl.load(values + line + byte, mask=inside, other=0).to(tl.int64)
        part, place = word, code * 0
        for k in tl.static_range(8):
            if k % GROUP == 0:  # a new group: its values, and 16 times the number of those already taken
                part, place = word >> (16 * KEEP * (k // GROUP)), code * 0
                if KEEP < 4:
                    part = part.to(tl.int32)
            kept = (code & (1 << k)) != 0
            value = (part >> place).to(tl.int16).to(x.dtype.element_ty, bitcast=True).to(tl.float32)
            value = tl.where(kept & (place < 16 * KEEP), value, 0.0)
            place += kept.to(tl.int32) << 4
            column = 8 * byte + k
            wanted = (b < batch)[:, None] & (column < cols)[None, :]
            factor = tl.load(x + b[:, None] * cols + column, mask=wanted, other=0.0).to(tl.float32)
            sums = add_product(sums, value, factor[:, None, :])
    total = tl.reshape(fold(sums, BATCH * ROWS, LANES, 1), (BATCH, ROWS))
    to = (split * batch + b).to(tl.int64)[:, None] * rows + row
    tl.store(out + to, narrow(total, out.dtype.element_ty), mask=(b < batch)[:, None] & (row < rows)[None, :])


def nm_gemv(x: Tensor, batch: int, codes: Tensor, values: Tensor, keep: int, group: int) -> Tensor:
    """x [..., in] times the matrix transposed: the same bits for a row alone or among others, on every GPU."""
    rows, width = codes.shape
    y = x.new_empty((*x.shape[:-1], rows))
    if not y.numel():
        return y
    if not width:
        return y.zero_()
    words = {1: torch.int16, 2: torch.int32, 4: torch.int64}[8 * keep // group]
    chosen = plan(rows, width)
    single = chosen.splits == 1
    out = y if single else x.new_empty(chosen.splits, y.numel(), dtype=torch.float32)
    with on_device(x):
        _rows[(-(-rows // ROWS), chosen.splits)](
            x,
            codes,
            values.view(words),
            out,
            rows,
            x.shape[-1],
            width,
            chosen.share * chosen.width,
            batch,
            KEEP=keep,
            GROUP=group,
            BATCH=power_of_two(batch),
            ROWS=ROWS,
            LANES=chosen.width,
            num_warps=warps(batch),
        )
        return y if single else finish(out, y)
