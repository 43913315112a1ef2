"""Sparse prefill behind one interface: which keys every query block of a prompt looks at, and what that loses.

A method sees one KV group of one layer and says what each block of query rows may see; nothing else about it is known.
`Selection` can hold any method's answer: whole key blocks (FlexPrefill, SeerAttention), single keys per group of rows
(AnchorAttention's stripes, vertical lines), diagonals, or a mixture. A method with an offline part has its parameters
searched once per head and saved as JSON values; one without (a dynamic method) simply has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROWS = 128

Parameters = Mapping[str, Any]


class Selection(Protocol):
    """What one query head sees. Keys behind a query are never seen, whatever this says."""

    def rows(self, first: int, last: int) -> Tensor:
        """bool [last - first, keys] for the queries at positions first ... last - 1."""
        ...


class PrefillMethod(Protocol):
    """A way of choosing. `name` is what a checkpoint says."""

    name: str

    def search(self, query: Tensor, key: Tensor, scale: float) -> Parameters:
        """Offline, once per query head, on one long sequence: query and key [N, D]. JSON values; {}: none."""
        ...

    def select(self, query: Tensor, key: Tensor, scale: float, parameters: Parameters, offset: int) -> Selection:
        """Online, per head and prompt: query [q, D], key [k, D]; the first query is at position `offset`, so that a
        prompt may come in pieces (q < k)."""
        ...


@dataclass(frozen=True)
class Measured:
    """recall: share of the softmax mass of the rows that is kept. density: share of causal (query, key) pairs seen."""

    recall: float
    density: float


def sparse_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: PrefillMethod,
    parameters: Sequence[Parameters],
    scale: float | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Reference attention of one sequence, each query head over what the method selects for it.

    Args:
        query: [query heads, q, D]; key, value: [KV heads, k, D] with k = offset + q; query head h reads KV head h // G.
        parameters: one per query head.

    Returns:
        (output [query heads, q, D], logsumexp of the logits seen, float32 [query heads, q]), so that pieces of a key
        sequence can be merged.
    """
    heads, length, width = query.shape
    group = heads // key.shape[0]
    scale = width**-0.5 if scale is None else scale
    out, lse = query.new_empty(heads, length, value.shape[2]), query.new_empty(heads, length, dtype=torch.float32)
    for h in range(heads):
        k, v = key[h // group], value[h // group]
        chosen = method.select(query[h], k, scale, parameters[h], offset)
        for first in range(0, length, ROWS):
            last = min(first + ROWS, length)
            seen = _seen(chosen, first + offset, last + offset, len(k), k.device)
            q = query[h, first:last]
            out[h, first:last] = scaled_dot_product_attention(q[None], k[None], v[None], seen[None], scale=scale)[0]
            lse[h, first:last] = _logits(q, k, scale, seen).logsumexp(-1)
    return out, lse


def measure(
    query: Tensor,
    key: Tensor,
    method: PrefillMethod,
    parameters: Parameters,
    scale: float,
    offset: int = 0,
) -> Measured:
    """Recall and density of one head; query [q, D], key [k, D]."""
    chosen = method.select(query, key, scale, parameters, offset)
    mass = pairs = total = 0.0
    for first in range(0, len(query), ROWS):
        last = min(first + ROWS, len(query))
        causal = _causal(first + offset, last + offset, len(key), key.device)
        seen = causal & chosen.rows(first + offset, last + offset)
        probabilities = _logits(query[first:last], key, scale, causal).softmax(-1)
        mass += float((probabilities * seen).sum())
        pairs += float(seen.sum())
        total += float(causal.sum())
    return Measured(mass / len(query), pairs / total)


def _causal(first: int, last: int, keys: int, device: torch.device) -> Tensor:
    return torch.arange(first, last, device=device)[:, None] >= torch.arange(keys, device=device)


def _seen(chosen: Selection, first: int, last: int, keys: int, device: torch.device) -> Tensor:
    """What is selected, and each query's own key, so that no row is empty."""
    own = torch.arange(first, last, device=device)[:, None] == torch.arange(keys, device=device)
    return (chosen.rows(first, last) | own) & _causal(first, last, keys, device)


def _logits(query: Tensor, key: Tensor, scale: float, seen: Tensor) -> Tensor:
    return ((query.float() @ key.float().T) * scale).masked_fill(~seen, -torch.inf)
