"""`chunk.attend` by torch's flex_attention, for GPUs: whole tiles that no query sees are skipped by a table.

The table comes from the positions at the tiles' edges. torch's own `create_block_mask` would first make a mask of every
query and key. On the CPU, and uncompiled, flex_attention computes everything and masks it: right, for tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .chunk import Span, oldest_of, seen_by
from .plan import HeadRule

TILE = 128


def attend(query: Tensor, span: Span, start: int, rule: HeadRule, block: int, scale: float, reach: int) -> Tensor:
    """Attention of queries [sequences, query heads, q, D] at positions from `start` on: the same shape."""
    queries = torch.arange(start, start + query.shape[2], device=query.device)
    table = block_mask(queries, span.positions, rule, block, reach)
    run: Any = _compiled() if query.is_cuda else flex_attention
    return run(
        query, span.key, span.value, block_mask=table, scale=scale, enable_gqa=query.shape[1] > span.key.shape[1]
    )


def block_mask(queries: Tensor, keys: Tensor, rule: HeadRule, block: int, reach: int) -> BlockMask:
    """Which tiles of TILE queries x TILE keys are seen at all, and which in full; positions are int64, rising."""
    q_first, q_last = _edges(queries)
    k_first, k_last = _edges(keys)
    low = oldest_of(rule, block, q_first, reach)[:, None]
    high = oldest_of(rule, block, q_last, reach)[:, None]
    q_first, q_last, reaching = q_first[:, None], q_last[:, None], q_last[:, None] - reach
    some = (k_first <= q_last) & ((k_first < rule.sink) | (k_last >= low)) & (k_last > q_first - reach)
    full = (k_last <= q_first) & ((k_last < rule.sink) | (k_first >= high)) & (k_first > reaching)
    full[:, -1] &= keys.numel() % TILE == 0
    partial = some & ~full

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = (q < queries.numel()) & (k < keys.numel())
        i, j = queries[q.clamp(max=queries.numel() - 1)], keys[k.clamp(max=keys.numel() - 1)]
        return inside & seen_by(rule, block, i, j, reach)

    return BlockMask.from_kv_blocks(
        *_table(partial), *_table(full), BLOCK_SIZE=TILE, mask_mod=mask, seq_lengths=(queries.numel(), keys.numel()),
        compute_q_blocks=False,
    )  # fmt: skip


def _edges(positions: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of every tile."""
    first = torch.arange(0, positions.numel(), TILE, device=positions.device)
    return positions[first], positions[(first + TILE - 1).clamp(max=positions.numel() - 1)]


def _table(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of each row, the wanted ones first: their number int32 [1, 1, rows] and order int32 [1, 1, rows, tiles]."""
    order = wanted.int().argsort(dim=1, descending=True, stable=True)
    return wanted.sum(1).int()[None, None], order.int()[None, None].contiguous()


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
