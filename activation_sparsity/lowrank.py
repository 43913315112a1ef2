"""A low-rank residual where it pays: error saved per weight read, against what the same weights save as channels.

What a matrix W misses is E = D W^T, D [tokens, in] the dropped inputs. The best rank-r map of D is W projected on the
first r right singular vectors P of E: left = P [out, r], right = P^T W [r, in]; rank k saves sigma_k^2 and costs
in + out weights. (An SVD of W alone, as in R-Sparse, does not know which inputs are dropped.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .base import LinearPolicy

NUDGE = 0.02  # of the share: the step of the difference quotient
TOKENS = 1024
LOOKED_AT = 1 << 20  # entries of inputs or outputs: of wide matrices fewer tokens, at least FEWEST
FEWEST = 256
ITERATIONS = 4  # of the randomised decomposition
MOST = 64  # ranks that are looked at
LENIENT = 0.25  # of the price that a rank must save to be looked at: what counts is the error that is left
PARTS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1)  # of these ranks: the price rises with every channel given up

Entries = Mapping[str, LinearPolicy]


def with_residual(
    x: Tensor,
    weights: Mapping[str, Tensor],
    make: Callable[[float], Entries],
    share: float,
    plain: Entries,
    worth: float = 1.0,
) -> tuple[Entries, int]:
    """(entries, sum of ranks) at the cost of `plain`: x [tokens, in], `make` gives entries without residual.

    `plain`: those of `share`. Ranks are taken whose saving per weight exceeds that of channels, and are paid for by a
    larger share of dropped channels. Without any, or where more than `worth` of the error is left, it is `plain`.
    """
    widest = max(max(weight.shape) for weight in weights.values())
    x = x[:: max(1, len(x) // min(TOKENS, max(FEWEST, LOOKED_AT // widest)))]
    size = sum(weight.numel() for weight in weights.values())
    more = min(share + NUDGE, 1.0)
    before, after = (_missed(x, weights, entries) for entries in (plain, make(more)))
    if more <= share:
        return plain, 0
    start = _energy(before)
    price = (_energy(after) - start) / ((more - share) * size)
    ranks = {}
    for name, weight in weights.items():
        values = _singular(before[name], MOST)[0]
        ranks[name] = int((values.square() > LENIENT * price * sum(weight.shape)).sum())
    best, lowest, taken = plain, worth * start, 0
    for part in PARTS:
        chosen = {name: int(part * rank + 0.5) for name, rank in ranks.items()}
        cost = sum(rank * sum(weights[name].shape) for name, rank in chosen.items())
        if cost == 0 or share + cost / size >= 1:
            continue
        found, left_over = _projected(x, weights, make(share + cost / size), chosen)
        if left_over < lowest:
            best, lowest, taken = found, left_over, sum(chosen.values())
    return best, taken


def _projected(
    x: Tensor, weights: Mapping[str, Tensor], entries: Entries, ranks: Mapping[str, int]
) -> tuple[Entries, float]:
    """`entries` with residuals of these ranks, and the squared error that is left."""
    missed = _missed(x, weights, entries)
    found: dict[str, LinearPolicy] = {}
    left_over = 0.0
    for name, entry in entries.items():
        error = missed[name]
        if ranks[name]:
            basis = _singular(error, ranks[name])[1]
            error = error - (error @ basis) @ basis.T
            entry = replace(entry, left=basis.contiguous(), right=(basis.T @ weights[name]).contiguous())
        found[name] = entry
        left_over += float(error.square().sum())
    return found, left_over


def _missed(x: Tensor, weights: Mapping[str, Tensor], entries: Entries) -> dict[str, Tensor]:
    found = {}
    for name, weight in weights.items():
        entry = entries[name]
        moved = x if entry.center is None else x - entry.center
        dropped = torch.where(moved.abs() <= entry.threshold, moved, moved.new_zeros(()))
        found[name] = dropped @ weight.T
    return found


def _energy(missed: Mapping[str, Tensor]) -> float:
    return sum(float(error.square().sum()) for error in missed.values())


def _singular(error: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(the largest singular values, their right singular vectors [out, n]) of error [tokens, out]; deterministic."""
    count = min(most, *error.shape)
    if min(error.shape) <= 4 * count:
        _, values, vt = torch.linalg.svd(error, full_matrices=False)
        return values[:count], vt[:count].T
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(error.shape[1], count + 8, generator=generator)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(error.T @ (error @ basis)).Q
    _, values, vt = torch.linalg.svd(error @ basis, full_matrices=False)
    return values[:count], (basis @ vt.T)[:, :count]
