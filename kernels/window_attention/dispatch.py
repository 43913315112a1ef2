"""Attention of one query per sequence over ranges of a ragged cache: the public names.

Compiled code on the CPU, torch's flash attention for sequences of several lengths on CUDA GPUs, else plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ..arguments import CODES, check_memory, name
from ..backend import choose
from ..library import operator
from ..tier import current
from . import cpu, reference

MAX_GROUP = 64


def window_attention(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v, where head h of sequence b sees the rows of two ranges: like `query`.

    query [batch, query heads, D]; keys and values [rows, D]; float32, bfloat16 or float16, of one dtype, contiguous.
    ranges int64 [batch, KV heads, 4]: first row and number of rows, twice; the two do not overlap, and query head h
    belongs to KV head h // (query heads / KV heads). A head that sees nothing gives zeros. Sums are float32, rounded
    once. The same bits for any number of threads, and for a sequence alone or among others. Raises KernelError for what
    does not fit, ranges beyond the rows included, and where a gradient would be needed.
    """
    return _operator(query, keys, values, ranges, scale)


def window_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    ranges: Tensor,
    scale: float,
) -> Tensor:
    """`window_attention` after keys[slots] = key and values[slots] = value, in place.

    key and value [batch, KV heads, D] in the cache's dtype, contiguous; slots int64 [batch, KV heads].
    """
    if torch.compiler.is_compiling():
        return _step_operator(query, key, value, keys, values, slots, ranges, scale)
    return _run_step(query, key, value, keys, values, slots, ranges, scale)  # the way through torch takes as long again


def _check(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor) -> int:
    code = CODES.get(query.dtype)
    if code is None:
        raise KernelError(f"query is {name(query.dtype)}, allowed: {', '.join(map(name, CODES))}")
    if query.dim() != 3 or not query.is_contiguous():
        raise KernelError(f"query has shape {list(query.shape)}, it must be contiguous [batch, heads, D]")
    width = query.shape[2]
    for what, cache in (("keys", keys), ("values", values)):
        if cache.dtype is not query.dtype or cache.device != query.device:
            raise KernelError(
                f"{what} are {name(cache.dtype)} on {cache.device}, the query {name(query.dtype)} on {query.device}; "
                "they must be equal"
            )
        if cache.dim() != 2 or cache.shape[1] != width or cache.shape != keys.shape or not cache.is_contiguous():
            raise KernelError(f"{what} have shape {list(cache.shape)}, they must be contiguous [rows, {width}]")
    if ranges.dtype is not torch.int64 or ranges.device != query.device or not ranges.is_contiguous():
        raise KernelError(
            f"ranges are {name(ranges.dtype)} on {ranges.device}, they must be contiguous int64 on {query.device}"
        )
    if ranges.dim() != 3 or ranges.shape[0] != query.shape[0] or ranges.shape[2] != 4:
        raise KernelError(f"ranges have shape {list(ranges.shape)}, they must be [{query.shape[0]}, KV heads, 4]")
    if not ranges.shape[1] or query.shape[1] % ranges.shape[1] or query.shape[1] > MAX_GROUP * ranges.shape[1]:
        raise KernelError(
            f"{query.shape[1]} query heads on {ranges.shape[1]} KV heads; allowed are 1 to {MAX_GROUP} for each"
        )
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad):
        raise KernelError("a gradient is required, and this attention has none", hint="run under torch.no_grad()")
    check_memory(query, keys, values)
    return code


def _run(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float) -> Tensor:
    code = _check(query, keys, values, ranges)
    return _attend(query, keys, values, ranges, scale, code)


def _attend(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float, code: int) -> Tensor:
    if query.is_cuda and choose("cuda") != "reference":
        from . import cuda

        if cuda.fits(query):
            return cuda.window_attention(query, keys, values, ranges, scale)
    tier = current() if query.is_cpu and choose("cpu") == "cpu" else None
    if tier is not None:
        out = cpu.window_attention(tier, query, keys, values, ranges, scale, code)
        if out is None:
            raise KernelError(f"ranges reach beyond the {keys.shape[0]} rows of the cache")
        return out
    _check_ranges(ranges, keys.shape[0])
    return reference.window_attention(query, keys, values, ranges, scale)


def _check_ranges(ranges: Tensor, rows: int) -> None:
    begin, count = ranges[..., 0::2], ranges[..., 1::2]
    if bool(((begin < 0) | (count < 0) | (count > rows) | (begin > rows - count)).any()):
        raise KernelError(f"ranges reach beyond the {rows} rows of the cache")


def _run_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    ranges: Tensor,
    scale: float,
) -> Tensor:
    code = _check(query, keys, values, ranges)
    wanted = (query.shape[0], ranges.shape[1], query.shape[2])
    for what, new in (("key", key), ("value", value)):
        if new.shape != wanted or new.dtype is not query.dtype or not new.is_contiguous():
            raise KernelError(
                f"{what} is {name(new.dtype)} {list(new.shape)}, it must be contiguous {name(query.dtype)} "
                f"{list(wanted)}"
            )
    if slots.dtype is not torch.int64 or slots.shape != ranges.shape[:2] or not slots.is_contiguous():
        raise KernelError(
            f"slots are {name(slots.dtype)} {list(slots.shape)}, they must be contiguous int64 {list(ranges.shape[:2])}"
        )
    tier = current() if query.is_cpu and choose("cpu") == "cpu" else None
    if tier is not None:
        out = cpu.window_step(tier, query, key, value, keys, values, slots, ranges, scale, code)
        if out is None:
            raise KernelError(f"slots or ranges reach beyond the {keys.shape[0]} rows of the cache")
        return out
    if query.is_cpu and slots.numel() and not 0 <= int(slots.min()) <= int(slots.max()) < keys.shape[0]:
        raise KernelError(f"slots or ranges reach beyond the {keys.shape[0]} rows of the cache")
    reference.store(key, value, keys, values, slots)
    return _attend(query, keys, values, ranges, scale, code)


def _fake(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query)


def _fake_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    ranges: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(query)


_operator = operator(
    "window_attention(Tensor query, Tensor keys, Tensor values, Tensor ranges, float scale) -> Tensor", _run, _fake
)
_step_operator = operator(
    "window_step(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots, "
    "Tensor ranges, float scale) -> Tensor",
    _run_step,
    _fake_step,
)
