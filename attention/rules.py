"""The rules that a planner may choose from, and their cost in tokens.

Spans alpha + beta N on MoA's grid: beta in eighths, alpha from -(shortest length) to the longest profiled one in steps
of an eighth of the latter; a pair is left out when it would keep more than there is at the longest length or beyond it,
or nothing at the shortest. With lengths 2048, 4096 and 8192, bounded at 16384, these are the 48 of the published search
space. Every span is offered with every number of sinks, which lie inside it: as long as the span has room for them the
bytes are the same, so that sinks compete with recent tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import FULL, SLOPES, HeadRule

STEPS = 8  # of alpha below the longest length, and of beta
LARGE_MODEL = 12288  # positions from which on MoA's own lengths fit, with the validation length behind them
MOA_LENGTHS = (2048, 4096, 8192)


def default_lengths(positions: int | None) -> tuple[int, ...]:
    """MoA's lengths, or a quarter, a half and three quarters of a smaller model's positions."""
    if positions is None or positions >= LARGE_MODEL:
        return MOA_LENGTHS
    return tuple(positions * quarter // 4 for quarter in (1, 2, 3))


def default_validation(lengths: Sequence[int], positions: int | None) -> int:
    """Half as long again as the longest profiled length, as far as the model goes."""
    longest = lengths[-1] * 3 // 2
    return longest if positions is None else max(min(longest, positions), 1)


def default_block(lengths: Sequence[int]) -> int:
    """64 tokens, or 16 where the shortest length has fewer than eight blocks of 64."""
    return 64 if lengths[0] >= 512 else 16


def default_sinks(block: int) -> tuple[int, ...]:
    return (0, 4, 16, 64, 128) if block >= 64 else (0, 1, 4, 8)


def spans(lengths: Sequence[int], block: int, beyond: int | None = None) -> list[HeadRule]:
    """MoA's grid for these ascending lengths, as rules without sinks; `beyond`: a further length that bounds the span.

    alpha's step is a whole number of blocks, at least one.
    """
    shortest, longest = lengths[0], lengths[-1]
    step = max(longest // STEPS // block, 1) * block
    found = []
    for alpha in range(-(shortest // step) * step, longest + 1, step):
        for slope in range(0, SLOPES + 1, SLOPES // STEPS):
            rule = HeadRule(0, alpha, slope / SLOPES)
            if rule.span(shortest) > 0 and all(rule.span(n) <= n for n in (longest, beyond or longest)):
                found.append(rule)
    return found


def search_space(
    lengths: Sequence[int], block: int, sinks: Sequence[int], least: int, beyond: int | None = None
) -> list[HeadRule]:
    """Every span with every number of sinks, once each: rules that differ at no length up to `beyond` are one.

    `least`: what a head keeps beside its sinks at any rate (`HeadPlan.block`).
    """
    known: dict[tuple[int, ...], HeadRule] = {}
    last = beyond or lengths[-1]
    at = sorted({*lengths, last, *range(block, last + 1, block)})
    for span in [FULL, *spans(lengths, block, beyond)]:
        for sink in sinks:
            rule = HeadRule(sink, span.alpha, span.beta)
            kept = tuple(rule.kept(length, least) for length in at)
            everything = kept == tuple(at)
            known.setdefault((0 if everything else sink, *kept), FULL if everything else rule)
    return list(known.values())


def kept_by(rules: Sequence[HeadRule], lengths: Tensor, block: int) -> Tensor:
    """`rule.kept` for int64 lengths [n]: int64 [rules, n] on their device."""
    sink, alpha, slope = (
        torch.tensor(values, dtype=torch.int64, device=lengths.device).view(-1, 1)
        for values in zip(*((rule.sink, rule.alpha, rule.slope) for rule in rules), strict=True)
    )
    span = alpha + torch.div(slope * lengths, SLOPES, rounding_mode="floor")
    return torch.minimum(lengths, torch.maximum(span, sink + block))
