"""How much goes where: sparsity per block, and exact counts per matrix for a threshold over the whole model.

Pure functions. OWL: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to
High Sparsity", ICML 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

OWL_LAMBDA = 0.08
OWL_MULTIPLE = 5.0
OWL_MAX_SPARSITY = 0.95
_LOW_BITS = 16


def uniform(sizes: Sequence[int], sparsity: float) -> list[float]:
    """The same sparsity for every block."""
    return [sparsity] * len(sizes)


def outlier_share(weight: Tensor, norm: Tensor, multiple: float = OWL_MULTIPLE) -> float:
    """Percentage of the entries of |W| * ||x|| (weight [out, in], norm [in]) above `multiple` times their mean."""
    return pooled_outlier_share([(weight, norm)], multiple)


def pooled_outlier_share(layers: Sequence[tuple[Tensor, Tensor]], multiple: float = OWL_MULTIPLE) -> float:
    """`outlier_share` of several matrices pooled: OWL's statistic of a block, one common mean.

    Norms must be per token alike: divide `LayerStats.norm` by sqrt(tokens) where matrices saw different tokens.
    """
    count = sum(weight.numel() for weight, _ in layers)
    mean = math.fsum(float(_outputs(w, x).sum(dtype=torch.float64)) for w, x in layers) / count
    above = sum(int((_outputs(w, x) > multiple * mean).sum()) for w, x in layers)
    return 100.0 * above / count


def owl(
    shares: Sequence[float],
    sizes: Sequence[int],
    sparsity: float,
    lam: float = OWL_LAMBDA,
    max_sparsity: float = OWL_MAX_SPARSITY,
) -> list[float]:
    """Sparsity per block: blocks with more outliers keep more, within a span of 2 * lam.

    s_l = clamp(c - 2 * lam * (D_l - min D) / (max D - min D), 0, max_sparsity), with c such that the mean of s_l
    weighted by parameters is `sparsity`, whatever was clamped (the paper takes the plain mean of equal blocks).

    The mean is exact to floating point; per-matrix counts round it once more, by half a weight at most.

    Args:
        shares: D_l, outlier percentage per block (`pooled_outlier_share`).
        sizes: prunable parameters per block.
        sparsity: the target over all blocks, in [0, 1).
        lam: half of the span.
        max_sparsity: upper clamp; a target above it raises the clamp to the target.
    """
    if len(shares) != len(sizes):
        raise ValueError(f"{len(shares)} outlier shares for {len(sizes)} blocks")
    low, high = min(shares), max(shares)
    if high == low:
        return uniform(sizes, sparsity)
    offsets = [-2 * lam * (share - low) / (high - low) for share in shares]
    return _level(offsets, sizes, sparsity, max(max_sparsity, sparsity))


def global_counts(matrices: Callable[[], Iterable[Tensor]], zeros: int) -> list[int]:
    """Zeros per matrix when the `zeros` smallest |w| of the whole model go; they sum to `zeros` exactly.

    Radix selection on the bit patterns of |w| in float32, which sort like the numbers: the first pass counts the upper
    16 bits, the second the lower 16 bits of the one bin that holds the threshold, the third counts below it and at it
    per matrix. Of entries equal to the threshold the first in order stay, as the matrix scope does inside a matrix, so
    `Unstructured.for_count` with these counts prunes exactly the model's smallest.

    Args:
        matrices: called three times, gives all matrices in the same order each time; one is held at a time.
        zeros: at most the number of all entries.
    """
    sizes: list[int] = []
    upper = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for matrix in matrices():
        sizes.append(matrix.numel())
        upper += torch.bincount(_magnitude_bits(matrix) >> _LOW_BITS, minlength=1 << _LOW_BITS).cpu()
    if not 0 <= zeros <= sum(sizes):
        raise ValueError(f"{zeros} zeros asked of {sum(sizes)} entries")
    if zeros == 0:
        return [0] * len(sizes)
    prefix, inside = _bin_of(upper, zeros)
    lower = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for matrix in matrices():
        bits = _magnitude_bits(matrix)
        rest = bits[bits >> _LOW_BITS == prefix] & ((1 << _LOW_BITS) - 1)
        lower += torch.bincount(rest, minlength=1 << _LOW_BITS).cpu()
    suffix, tied_zeros = _bin_of(lower, inside)
    threshold = (prefix << _LOW_BITS) | suffix
    return _count(matrices, threshold, int(lower[suffix]) - tied_zeros)


def _count(matrices: Callable[[], Iterable[Tensor]], threshold: int, tied_kept: int) -> list[int]:
    counts = []
    for matrix in matrices():
        bits = _magnitude_bits(matrix)
        tied = int((bits == threshold).sum())
        stay = min(tied, tied_kept)
        tied_kept -= stay
        counts.append(int((bits < threshold).sum()) + tied - stay)
    return counts


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th smallest entry (from 1), and its rank inside that bin."""
    edges = histogram.cumsum(0)
    found = int(torch.searchsorted(edges, rank))
    return found, rank - (int(edges[found - 1]) if found else 0)


def _magnitude_bits(matrix: Tensor) -> Tensor:
    return matrix.detach().to(torch.float32).abs().reshape(-1).view(torch.int32)


def _outputs(weight: Tensor, norm: Tensor) -> Tensor:
    return weight.to(torch.float32).abs() * norm


def _level(offsets: Sequence[float], sizes: Sequence[int], target: float, ceiling: float) -> list[float]:
    """clamp(c + offset, 0, ceiling) with the weighted mean `target`: c by bisection down to neighbouring floats."""

    def at(c: float) -> list[float]:
        return [min(max(c + offset, 0.0), ceiling) for offset in offsets]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)

    low, high = -max(offsets), ceiling - min(offsets)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(at(middle)) < target else (low, middle)
    return at(high)
