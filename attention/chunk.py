"""Several new tokens at once on a ragged cache: prefill, prompts in pieces, further turns.

Sequences with equally many tokens and heads with one rule go together. Queries come in blocks, and a block multiplies only
the sinks and the range of keys that one of its queries sees: the work follows the plan, not the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .mask import UNLIMITED
from .masked import masked_attention
from .plan import HeadRule

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
            return Span(new, key, value)
        return Span(torch.cat([self.positions, new]), torch.cat([self.key, key], 2), torch.cat([self.value, value], 2))


def seen_by(rule: HeadRule, block: int, queries: Tensor, keys: Tensor, reach: int) -> Tensor:
    """bool [q, k]: `HeadPlan.visible` of one rule for positions without padding, within the model's own window."""
    i, j = queries[:, None], keys[None, :]
    n = i + 1
    kept = torch.minimum(n, (rule.alpha + rule.slope * n // 1024).clamp(min=rule.sink + block))
    return (j <= i) & ((j < rule.sink) | (j > i - (kept - rule.sink)) | (kept > i)) & (j > i - reach)


def attend(query: Tensor, span: Span, start: int, rule: HeadRule, block: int, scale: float, reach: int) -> Tensor:
    """Attention of queries [sequences, query heads, q, D] at positions from `start` on: the same shape."""
    out = query.new_empty(query.shape)
    for begin, end in _blocks(query.shape[2]):
        queries = torch.arange(start + begin, start + end, device=query.device)
        oldest = start + begin + 1 - (rule.kept(start + begin + 1, block) - rule.sink)
        oldest = max(oldest, start + begin + 1 - reach) if reach < UNLIMITED else oldest
        sinks, first, last = torch.searchsorted(
            span.positions, torch.tensor([rule.sink, max(oldest, 0), start + end], device=query.device)
        ).tolist()
        keys = span.positions
        if first <= sinks:
            pieces = [slice(0, last)]
        else:
            pieces = [slice(0, sinks), slice(first, last)]
        join = lambda tensor, dim: torch.cat([tensor.narrow(dim, p.start, p.stop - p.start) for p in pieces], dim)
        seen = seen_by(rule, block, queries, join(keys, 0), reach)[None, None]
        heads = span.key.shape[1]
        out[:, :, begin:end] = masked_attention(
            query[:, :, begin:end], join(span.key, 2), join(span.value, 2), seen.expand(1, heads, -1, -1), scale
        )
    return out


def _blocks(queries: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, queries, QUERIES):
        yield begin, min(begin + QUERIES, queries)
