"""`channel_gemv` for GPUs: a list of the active channels, made on the device, then rows of the weight by that list.

`dispatch` has checked the arguments. The host never learns how many channels are active: the grid is fixed, and every
program takes an equal part of the list. Also what other operations with lists of channels build upon.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import add_product, finish, fold, on_device, partial_sums, warps
from ..gpu_plan import Plan, cut, power_of_two

LIST_BLOCK = 1024
OUTPUTS = 256  # of a program: 512 bytes of a row of the weight, one warp for each of the
CHANNELS = 4  # side by side, and
UNROLL = 4  # after each other in a step, so that 16 rows are under way at once


def plan(channels: int, outputs: int) -> Plan:
    """Steps over a list of all channels; of a shorter list every split gets its share. One program for 256 outputs."""
    return cut(channels, CHANNELS * UNROLL, -(-outputs // OUTPUTS))


@triton.jit
def _needed(
    x: tl.tensor, threshold: tl.tensor, channel: tl.tensor, channels: tl.tensor, batch: tl.tensor, BATCH: tl.constexpr
) -> tl.tensor:
    """x [BATCH, ...] in float32 and whether each counts: not `|x| <= threshold`, so that NaN does."""
    b = tl.arange(0, BATCH)[:, None]
    inside = (b < batch) & (channel < channels)[None, :]
    value = tl.load(x + b * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    limit = tl.load(threshold + channel, mask=channel < channels, other=0.0)[None, :]
    active = tl.where(tl.abs(value) <= limit, 0, 1) * inside.to(tl.int32)
    return value, active


@triton.jit
def _list_active(
    x: tl.tensor,
    threshold: tl.tensor,
    ids: tl.tensor,
    factors: tl.tensor,
    count: tl.tensor,
    channels: tl.tensor,
    batch: tl.tensor,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """ids [channels]: the channels that a row needs, ascending; factors [batch, channels]: x there, 0 where not active.

    A program writes one block, and counts by itself what lies before it: cheaper than a second launch.
    """
    block = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, block * BLOCK, BLOCK):
        value, active = _needed(x, threshold, first + tl.arange(0, BLOCK), channels, batch, BATCH)
        before += tl.max(active, 0)
    offset = tl.sum(before, 0)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    value, active = _needed(x, threshold, channel, channels, batch, BATCH)
    needed = tl.max(active, 0)
    position = offset + tl.cumsum(needed, 0) - needed
    b = tl.arange(0, BATCH)[:, None]
    tl.store(ids + position, channel, mask=needed != 0)
    kept = (needed != 0)[None, :] & (b < batch)
    tl.store(factors + b * channels + position[None, :], tl.where(active != 0, value, 0.0), mask=kept)
    if block == tl.num_programs(0) - 1:
        tl.store(count, offset + tl.sum(needed, 0))


@triton.jit
def part_of_list(count: tl.tensor, length: tl.tensor, COUNTED: tl.constexpr) -> tl.tensor:
    """First and last position of this program (split: axis 1) in a list of `length`, or of the number in `count`."""
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    total = length
    if COUNTED:
        total = tl.load(count)
    return (split * total // splits).to(tl.int32), ((split + 1) * total // splits).to(tl.int32)


@triton.jit
def _add_rows(
    ids: tl.tensor,
    factors: tl.tensor,
    count: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    outputs: tl.tensor,
    batch: tl.tensor,
    COUNTED: tl.constexpr,
    BATCH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """out float32 [splits, batch, outputs]: sum over a part of the list of factors[b, p] * weight[ids[p]]."""
    b = tl.arange(0, BATCH)[:, None]
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    begin, end = part_of_list(count, length, COUNTED)
    sums = tl.zeros((BATCH, CHANNELS, OUTPUTS), tl.float32)
    for first in range(begin, end, CHANNELS * UNROLL):
        for u in tl.static_range(UNROLL):
            position = first + u * CHANNELS + tl.arange(0, CHANNELS)
            channel = tl.load(ids + position, mask=position < end, other=-1)
            there = (channel >= 0) & (channel < channels)
            wanted = there[None, :] & (b < batch)
            factor = tl.load(factors + b * length + position[None, :], mask=wanted, other=0.0)
            # Read in the shape of the sums, so that the compiler leaves the values in the threads that loaded them.
            place = channel.to(tl.int64)[None, :, None] * outputs + output
            row = tl.load(weight + place, mask=there[None, :, None] & (output < outputs), other=0.0)
            sums = add_product(sums, row.to(tl.float32), factor[:, :, None])
    to = (tl.program_id(1) * batch + b).to(tl.int64) * outputs + output[None, :]
    tl.store(out + to, fold(sums, BATCH, CHANNELS, OUTPUTS), mask=(b < batch) & (output < outputs)[None, :])


class Listed(NamedTuple):
    """ids int32 [in], x by that list float32 [batch, in], their number int32 [1]; beyond it they hold anything."""

    ids: Tensor
    factors: Tensor
    number: Tensor


def list_active(x: Tensor, batch: int, threshold: Tensor) -> Listed:
    """The inputs that a row of x needs."""
    channels = x.shape[-1]
    ids = x.new_empty(channels, dtype=torch.int32)
    factors = x.new_empty(batch, channels, dtype=torch.float32)
    count = x.new_empty(1, dtype=torch.int32)
    block = min(LIST_BLOCK, power_of_two(channels))
    _list_active[(-(-channels // block),)](
        x,
        threshold,
        ids,
        factors,
        count,
        channels,
        batch,
        BATCH=power_of_two(batch),
        BLOCK=block,
        num_warps=warps(batch),
    )
    return Listed(ids, factors, count)


def add_rows(
    ids: Tensor, factors: Tensor, count: Tensor | None, weight_t: Tensor, y: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y [..., out]: bias plus rows of weight_t [in, out] by a list, times factors float32 [batch, ids.numel()].

    The first `count` of the list count, all where it is None. Numbers that are no rows add nothing.
    """
    (channels, outputs), batch = weight_t.shape, factors.shape[0]
    chosen = plan(ids.numel(), outputs)
    out, sums = partial_sums(chosen.splits, y, bias)
    width = min(OUTPUTS, power_of_two(outputs))
    _add_rows[(-(-outputs // width), chosen.splits)](
        ids,
        factors,
        ids if count is None else count,
        weight_t,
        sums,
        ids.numel(),
        channels,
        outputs,
        batch,
        COUNTED=count is not None,
        BATCH=power_of_two(batch),
        OUTPUTS=width,
        CHANNELS=CHANNELS,
        UNROLL=UNROLL,
        num_warps=warps(batch),
    )
    return finish(out, y)


def channel_gemv(
    x: Tensor,
    batch: int,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    listed: Listed | None = None,
) -> Tensor:
    """x [..., in] times weight_t [in, out] over the active inputs, which may be `listed` already, plus bias.

    The same bits on every run and on every GPU. Those of a row among others can differ from those of the row alone: the
    list of both is cut at other places.
    """
    if not batch * weight_t.numel():
        return empty_sum(x, weight_t.shape[1], bias)
    y = x.new_empty((*x.shape[:-1], weight_t.shape[1]))
    with on_device(x):
        return add_rows(*(listed or list_active(x, batch, threshold)), weight_t, y, bias)


def empty_sum(x: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    """[..., outputs] of no inputs, or no outputs."""
    y = x.new_zeros((*x.shape[:-1], outputs))
    return y if bias is None else y + bias
