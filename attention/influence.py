"""What a rule would cost a head: first-order change of the loss when keys are removed and the row is renormalised.

For one query row: A = softmax probabilities, O = the head's output, g = dLoss/dO, Gr = g V^T, S = sum_n A_n Gr_n = g O.
Removing a set R of keys with mass a = sum_R A changes O to (O - sum_R A_n v_n) / (1 - a), so to first order in O

    dLoss = sum_R A_n (S - Gr_n) / (1 - a)                                  (exact where the loss is linear in O)

Both sums are running sums over the keys, so one pass over a tile of rows scores every rule, and no N x N matrix is ever
stored. A row's effect is that of its whole KV head: the effects of the G query heads that share it, added with sign.

MoA (arXiv 2406.14909) removes one key at a time, E_n = A_n (S - Gr_n) / (1 - A_n), and adds up |E_n| over the set and
over query heads: the `moa` loss here, for comparison.

The algebra is float32 whatever the model computes in (near A = 1, 1 - A has three digits in bfloat16), running sums are
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import HeadRule
from .rules import kept_by

ROWS = 64
LEAST = 1e-6  # of 1 - a


@dataclass(frozen=True)
class Influence:
    """Sums over the rows of one attention layer, float64 [KV heads, rules].

    Attributes:
        group: sum of |row effect|.
        fisher: sum of its square.
        moa: sum of |E| over removed keys.
        mass: sum over rows and query heads of the probability removed.
        rows: number of rows times query heads per KV head, to make `mass` a mean.
    """

    group: Tensor
    fisher: Tensor
    moa: Tensor
    mass: Tensor
    rows: int

    def plus(self, other: Influence) -> Influence:
        return Influence(
            self.group + other.group,
            self.fisher + other.fisher,
            self.moa + other.moa,
            self.mass + other.mass,
            self.rows + other.rows,
        )


def influence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    rules: Sequence[HeadRule],
    block: int,
    *,
    scale: float | None = None,
    seen: Callable[[int, int], Tensor] | None = None,
) -> Influence:
    """Scores of every rule for one layer and one sequence without padding.

    Args:
        query: [query heads, N, D]; rotated, as the attention multiplies them. Any float dtype.
        key, value: [KV heads, N, D]; query head h reads KV head h // G.
        gradient: [query heads, N, D], dLoss/dO.
        scale: of q k^T; D ** -0.5 where not given.
        seen: (first row, last row + 1) -> bool [rows, N], the model's own mask; causal where not given.
    """
    sums: Influence | None = None
    for rows, effect, single, removed in _tiles(query, key, value, gradient, rules, block, scale, seen):
        tile = Influence(
            effect.abs().sum(1),
            effect.square().sum(1),
            single.sum(1),
            removed.sum(1),
            rows * query.shape[0] // key.shape[0],
        )
        sums = tile if sums is None else sums.plus(tile)
    assert sums is not None
    return sums


def row_effects(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    rules: Sequence[HeadRule],
    block: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """The signed effect of every row, float64 [KV heads, N, rules]; arguments as in `influence`."""
    tiles = _tiles(query, key, value, gradient, rules, block, scale, None)
    return torch.cat([effect for _, effect, _, _ in tiles], 1)


def _tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    rules: Sequence[HeadRule],
    block: int,
    scale: float | None,
    seen: Callable[[int, int], Tensor] | None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Per tile: its rows, and float64 [KV heads, rows, rules] of row effects, of MoA's sums and of removed mass."""
    heads, length, width = query.shape
    kv_heads = key.shape[0]
    key, value = (x.float().transpose(1, 2).unsqueeze(1) for x in (key, value))  # [KV heads, 1, D, N]
    query, gradient = (x.float().view(kv_heads, heads // kv_heads, length, x.shape[2]) for x in (query, gradient))
    scale = width**-0.5 if scale is None else scale
    sinks = torch.tensor([rule.sink for rule in rules], device=query.device)
    for first in range(0, length, ROWS):
        last = min(first + ROWS, length)
        positions = torch.arange(first, last, device=query.device)
        mask = positions[:, None] >= torch.arange(last, device=query.device)
        if seen is not None:
            mask = mask & seen(first, last)[:, :last]
        # Keys behind the last row of the tile are seen by nobody: the tile is as wide as it must be.
        logits = (query[:, :, first:last] * scale) @ key[..., :last]
        a = logits.masked_fill_(~mask, -torch.inf).softmax(-1)
        g = gradient[:, :, first:last] @ value[..., :last]
        e = a * ((a * g).sum(-1, keepdim=True) - g)
        kept = kept_by(rules, positions + 1, block).T  # [rows, rules]
        start = torch.minimum(sinks, positions[:, None] + 1)
        end = torch.maximum(positions[:, None] + 1 - (kept - start), start)
        removed = _between(a, start, end)
        left = a.sum(-1, keepdim=True, dtype=torch.float64) - removed  # 1 but for rounding, which counts near a = 1
        effect = _between(e, start, end) / left.clamp_min(LEAST)
        single = _between(e.abs() / (1 - a).clamp_min(LEAST), start, end)
        yield last - first, effect.sum(1), single.sum(1), removed.sum(1)


def _between(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Sums of x [KV heads, G, rows, keys] over start <= key < end, int64 [rows, rules]: [KV heads, G, rows, rules]."""
    total = torch.nn.functional.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))
    shape = (*x.shape[:2], *end.shape)
    return total.gather(-1, end.expand(shape)) - total.gather(-1, start.expand(shape))
