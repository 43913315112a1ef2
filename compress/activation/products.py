"""The products of one token under a policy, each with the kernels that will run it, and their times on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...kernels.arguments import CODES
from ...kernels.bench.cases_channel import skipping
from ...kernels.bench.rounds import Contender, run_rounds
from ...kernels.bitmask import dispatch as bitmask
from ...kernels.bitmask_gemv import dispatch as packed_gemv
from ...kernels.channel_gemv.dispatch import channel_gemv, transpose
from ...kernels.choice import choose
from ...kernels.dense_gemv.dispatch import dense_gemv
from ...kernels.dual_gemv import dispatch as dual
from ...kernels.memory import empty_weight
from ...kernels.neuron_mlp.dispatch import neuron_mlp
from ..blocks import Prunable, StreamedModel
from ..source import StoredSource
from .sites import BlockSites

Kind = Literal["whole", "inputs", "cores", "gate"]
SHARES = (0.0, 0.3, 0.5, 0.7, 0.9)
ROUNDS = 31
HALVES = (torch.bfloat16, torch.float16)
_FEW, _STEP = (16, 64), 0.05


@dataclass(frozen=True)
class Product:
    """A linear map [out, in], or, of kinds "cores" and "gate", an MLP [neurons, hidden] with a gate.

    `kind`: "whole" skips nothing, "inputs" skips inputs, "cores" neurons; "gate" those after a gate that is computed
    whole. `kept`: shares of the weights of each matrix that pruning left, 1.0 for matrices that are stored dense.
    """

    kind: Kind
    shape: tuple[int, int]
    kept: tuple[float, ...] = (1.0,)


def products(
    model: StreamedModel, blocks: Iterable[BlockSites], source: StoredSource, method: str, dtype: torch.dtype
) -> Counter[Product]:
    """How often a token computes what: all linear maps of the blocks but experts, and the output matrix.

    Pruned matrices are packed as at loading. Kernels skip neither in int8 values nor neurons of MLPs without a gate:
    these are "whole", as dense ones.
    """
    found: Counter[Product] = Counter()
    neurons: Kind | None = {"coreinfer": "cores", "cats": "gate"}.get(method)  # type: ignore[assignment]

    def kept(prunable: Prunable) -> float:
        keys = model.source_keys(prunable)
        record = source.record(keys[0]) if len(keys) == 1 else None
        if record is None or record.int8 is not None or dtype not in HALVES or not math.prod(record.shape):
            return 1.0
        share = record.nnz / math.prod(record.shape)
        return round(share / _STEP) * _STEP if choose("bitmask", *prunable.shape, dtype, share).sparse else 1.0

    def int8(prunable: Prunable) -> bool:
        records = [source.record(key) for key in model.source_keys(prunable)]
        return any(record is not None and record.int8 is not None for record in records)

    for index, sites in enumerate(blocks):
        maps = {p.name: p for p in model.prunables(index) if p.kind != "expert"}
        skipping_ = {p.name for p in sites.maps} if neurons is None else set()
        for _, parts in sites.mlps if neurons is not None else ():
            names = list(dict.fromkeys(name for name in (parts.gate, parts.up, parts.down) if name))
            if parts.gate is None or any(int8(maps[name]) for name in names):
                continue
            assert neurons is not None
            shares = tuple(kept(maps[name]) for name in (parts.gate, parts.up, parts.down))
            found[Product(neurons, (parts.neurons, maps[parts.down].shape[0]), shares)] += 1
            for name in names:
                del maps[name]
        for name, prunable in maps.items():
            kind: Kind = "inputs" if name in skipping_ and not int8(prunable) else "whole"
            found[Product(kind, prunable.shape, (kept(prunable),))] += 1
    head = model.head()
    if head is not None:
        found[Product("whole", head.shape, (kept(head),))] += 1
    return found


def measured(product: Product, dtype: torch.dtype, rounds: int = ROUNDS) -> tuple[float, list[float]]:
    """(microseconds of one row without skipping, those of each of SHARES skipped; none of a "whole" product).

    Medians of interleaved rounds. On one thread its own time counts, which other programs do not lengthen.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        contenders = list(_contenders(product, product.shape, dtype))
        warm = {one.name: one.call for one in _contenders(product, _FEW, dtype)}
        times = run_rounds(contenders, rounds, warm=warm, clock=clock)
    dense, *sparse = [statistics.median(times[one.name]) for one in contenders]
    return dense, sparse


def runtime_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The checkpoint's, in which a loaded model runs, if kernels know it."""
    return dtype if dtype in CODES and dtype is not None else torch.bfloat16


def _contenders(product: Product, shape: tuple[int, int], dtype: torch.dtype) -> Iterable[Contender]:
    generator = torch.Generator().manual_seed(0)
    mlp = product.kind in ("cores", "gate")
    rows, cols = shape
    weights = [
        empty_weight(rows, cols, dtype=dtype).copy_(torch.randn(rows, cols, generator=generator))
        for _ in range(3 if mlp else 1)
    ]
    x = (torch.randn(1, cols, generator=generator) / cols**0.5).to(dtype)
    if not mlp:
        (weight,), (kept,) = weights, product.kept
        yield Contender("without", _linear(x, weight, kept, generator))
        if product.kind == "inputs":
            yield from _inputs(x, weight, kept, generator)
        return
    gate, up, down_t = weights
    inner = torch.randn(1, rows, generator=generator).to(dtype)
    turned = empty_weight(cols, rows, dtype=dtype).copy_(down_t.t())
    three = [
        _linear(one, weight, kept, generator)
        for one, weight, kept in zip((x, x, inner), (gate, up, turned), product.kept, strict=True)
    ]
    yield Contender("without", lambda: [call() for call in three][-1])
    for share in SHARES:
        some = torch.randperm(rows, generator=generator)[: max(1, round((1 - share) * rows))].sort().values.int()
        if product.kind == "cores":
            yield Contender(repr(share), partial(neuron_mlp, x, gate, up, down_t, some))
        else:
            yield Contender(repr(share), partial(_after_gate, x, gate, up, down_t, some))


def _after_gate(x: Tensor, gate: Tensor, up: Tensor, down_t: Tensor, some: Tensor) -> Tensor:
    dense_gemv(x, gate)
    return neuron_mlp(x, gate, up, down_t, some)


def _bits(weight: Tensor, kept: float, generator: torch.Generator) -> Tensor:
    return bitmask.pack_bits(torch.rand(weight.shape, generator=generator) < kept)


def _linear(x: Tensor, weight: Tensor, kept: float, generator: torch.Generator) -> Callable[[], Tensor]:
    if kept == 1.0:
        return partial(dense_gemv, x, weight)
    bits = _bits(weight, kept, generator)
    packed = packed_gemv.pack(bits, bitmask.compress(weight, bits), weight.shape[1])
    return partial(packed_gemv.bitmask_gemv, x, packed, weight.shape[0])


def _inputs(x: Tensor, weight: Tensor, kept: float, generator: torch.Generator) -> Iterable[Contender]:
    if kept == 1.0:
        weight_t = transpose(weight)
        for share in SHARES:
            yield Contender(repr(share), partial(channel_gemv, x, weight_t, skipping(x, share)[0]))
        return
    bits = _bits(weight, kept, generator)
    packed = dual.pack(bits, bitmask.compress(weight, bits), weight.shape[1])
    for share in SHARES:
        yield Contender(repr(share), partial(dual.dual_gemv, x, packed, skipping(x, share)[0], weight.shape[0]))
