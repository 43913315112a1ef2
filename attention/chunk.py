"""Several new tokens at once on a ragged cache: prefill, prompts in pieces, further turns.

Sequences with equally many tokens and heads with one rule go together. Queries come in blocks, and a block multiplies
only the sinks and the range of keys that one of its queries sees: the work follows the plan, not the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masked import masked_attention
from .plan import SLOPES, HeadRule

QUERIES = 256  # of one block


@dataclass(frozen=True)
class Span:
    """Keys of some sequences and heads, in the order of their positions.

    Attributes:
        positions: int64 [k], rising.
        key, value: [sequences, heads, k, D].
    """

    positions: Tensor
    key: Tensor
    value: Tensor

    def then(self, start: int, key: Tensor, value: Tensor) -> Span:
        """With further tokens at positions from `start` on."""
        new = torch.arange(start, start + key.shape[2], device=key.device)
        if not self.positions.numel():
            return Span(new, key, value)  # as they are: no copy
        return Span(torch.cat([self.positions, new]), torch.cat([self.key, key], 2), torch.cat([self.value, value], 2))


def seen_by(rule: HeadRule, block: int, queries: Tensor, keys: Tensor, reach: int) -> Tensor:
    """bool: whether queries see keys, at int64 positions that broadcast; `HeadPlan.visible` within the model's reach."""
    return (
        (keys <= queries)
        & ((keys < rule.sink) | (keys >= oldest_of(rule, block, queries, 0)))
        & (keys > queries - reach)
    )


def oldest_of(rule: HeadRule, block: int, queries: Tensor, reach: int) -> Tensor:
    """The oldest position that queries at int64 positions see, sinks aside; it never falls. `reach` 0: no limit."""
    n = queries + 1
    kept = torch.minimum(n, (rule.alpha + rule.slope * n // SLOPES).clamp(min=rule.sink + block))
    oldest = torch.where(kept < n, n - (kept - rule.sink), 0)
    return torch.maximum(oldest, n - reach) if reach else oldest


def attend(query: Tensor, span: Span, start: int, rule: HeadRule, block: int, scale: float, reach: int) -> Tensor:
    """Attention of queries [sequences, query heads, q, D] at positions from `start` on: the same shape."""
    out = query.new_empty(query.shape)
    for begin in range(0, query.shape[2], QUERIES):
        queries = torch.arange(start + begin, start + min(begin + QUERIES, query.shape[2]), device=query.device)
        end = int(queries[-1]) + 1
        oldest = oldest_of(rule, block, queries[0], reach)
        edges = torch.stack([queries.new_tensor(rule.sink), oldest, queries[-1] + 1])
        sinks, first, last = torch.searchsorted(span.positions, edges).tolist()
        pieces = [slice(last)] if first <= sinks else [slice(sinks), slice(first, last)]
        positions, key, value = (
            torch.cat([tensor[..., piece, :] for piece in pieces], -2)
            for tensor in (span.positions[:, None], span.key, span.value)
        )
        seen = seen_by(rule, block, queries[:, None], positions[None, :, 0], reach).expand(1, key.shape[1], -1, -1)
        out[:, :, begin : end - start] = masked_attention(query[:, :, begin : end - start], key, value, seen, scale)
    return out
