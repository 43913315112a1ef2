"""`dual_gemv` for GPUs: the words of active channels, by a list made on the device.

`gpu_layout` makes the matrix; `channel_gemv/triton.py` the list. `dispatch` has checked the arguments.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..channel_gemv.triton import Listed, empty_sum, list_active, part_of_list
from ..gpu import add_product, finish, fold, on_device, partial_sums, warps
from ..gpu_plan import Plan, cut, power_of_two
from .gpu_layout import DualMatrix

WORDS = 4  # of 64 outputs: 256 outputs of a channel are side by side,
CHANNELS = 2  # of 2 channels; 4 outputs for each of 128 threads
UNROLL = 4


def plan(channels: int, words: int) -> Plan:
    """Steps over a list of all channels, one program for 4 words."""
    return cut(channels, CHANNELS * UNROLL, -(-words // WORDS))


@triton.jit
def count_bits(mask: tl.tensor) -> tl.tensor:
    """Bits set in uint64. Compilers know these lines and make one instruction of them."""
    pairs = mask - ((mask >> 1) & 0x5555555555555555)
    nibbles = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _next(place: tl.tensor, four: tl.tensor, k: tl.constexpr) -> tl.tensor:
    """The value under bit k of `four`, 0 where it is not set, and where the next one lies."""
    kept = (four & (1 << k)) != 0
    return tl.load(place, mask=kept, other=0.0).to(tl.float32)[None, :, :], place + kept.to(tl.int32)


@triton.jit
def _add_words(
    ids: tl.tensor,
    factors: tl.tensor,
    count: tl.tensor,
    masks: tl.tensor,
    starts: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    rows: tl.tensor,
    words: tl.tensor,
    batch: tl.tensor,
    BATCH: tl.constexpr,
    WORDS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """out float32 [splits, batch, rows]: sum over a part of the list of factors[b, p] * row ids[p] of W^T.

    A thread owns 4 outputs. Their first value: begin of the word, bits of the word below them.
    """
    LANES: tl.constexpr = 16 * WORDS
    b, lane = tl.arange(0, BATCH), tl.arange(0, LANES)
    word, shift = tl.program_id(0) * WORDS + lane // 16, (lane % 16 * 4).to(tl.uint64)
    below = (tl.full((LANES,), 1, tl.uint64) << shift) - 1
    begin, end = part_of_list(count, length, True)
    sums0 = tl.zeros((BATCH, CHANNELS, LANES), tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for first in range(begin, end, CHANNELS * UNROLL):
        for u in tl.static_range(UNROLL):
            position = first + u * CHANNELS + tl.arange(0, CHANNELS)
            channel = tl.load(ids + position, mask=position < end, other=0)
            there = (position < end)[:, None] & (word < words)[None, :]
            wanted = (b < batch)[:, None] & (position < end)[None, :]
            factor = tl.load(factors + b[:, None] * length + position, mask=wanted, other=0.0)[:, :, None]
            at = channel.to(tl.int64)[:, None] * words + word
            mask = tl.load(masks + at, mask=there, other=0).to(tl.uint64, bitcast=True)
            start = tl.load(starts + at, mask=there, other=0)
            place = values + (start + count_bits(mask & below))
            four = (mask >> shift).to(tl.int32)
            value, place = _next(place, four, 0)
            sums0 = add_product(sums0, value, factor)
            value, place = _next(place, four, 1)
            sums1 = add_product(sums1, value, factor)
            value, place = _next(place, four, 2)
            sums2 = add_product(sums2, value, factor)
            value, place = _next(place, four, 3)
            sums3 = add_product(sums3, value, factor)
    row = (tl.program_id(0) * LANES + lane) * 4
    to = out + (tl.program_id(1) * batch + b).to(tl.int64)[:, None] * rows + row
    line = (b < batch)[:, None]
    tl.store(to, fold(sums0, BATCH, CHANNELS, LANES), mask=line & (row < rows))
    tl.store(to + 1, fold(sums1, BATCH, CHANNELS, LANES), mask=line & (row + 1 < rows))
    tl.store(to + 2, fold(sums2, BATCH, CHANNELS, LANES), mask=line & (row + 2 < rows))
    tl.store(to + 3, fold(sums3, BATCH, CHANNELS, LANES), mask=line & (row + 3 < rows))


def dual_gemv(
    x: Tensor,
    batch: int,
    matrix: DualMatrix,
    threshold: Tensor,
    rows: int,
    bias: Tensor | None = None,
    listed: Listed | None = None,
) -> Tensor:
    """x [..., in] times W^T over the active inputs and kept weights, plus bias; `listed` as in `channel_gemv`.

    The same bits on every run and on every GPU. Those of a row among others can differ from those of the row alone: the
    list of both is cut at other places.
    """
    channels, words = matrix.masks.shape
    if not batch * rows * channels:
        return empty_sum(x, rows, bias)
    y = x.new_empty((*x.shape[:-1], rows))
    chosen = plan(channels, words)
    with on_device(x):
        out, sums = partial_sums(chosen.splits, y, bias)
        ids, factors, count = listed or list_active(x, batch, threshold)
        _add_words[(-(-words // WORDS), chosen.splits)](
            ids,
            factors,
            count,
            *matrix,
            sums,
            channels,
            rows,
            words,
            batch,
            BATCH=power_of_two(batch),
            WORDS=WORDS,
            CHANNELS=CHANNELS,
            UNROLL=UNROLL,
            num_warps=warps(batch),
        )
        return finish(out, y)
