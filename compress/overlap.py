"""Does the evaluation text occur in the calibration text?

A window of 64 tokens of the evaluation text counts as seen when it occurs, at any offset, in the calibration tokens.
The search is a rolling hash, polynomial in an odd base modulo 2^64, so that the hash of every offset comes from one
prefix sum; every hash hit is confirmed token by token.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from ..errors import DataError

WINDOW = 64
ALLOWED_SHARE = 0.01

_BASE = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2^64


class Named(Protocol):
    """A text as it is spoken of."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...


def overlap_share(evaluation: Tensor, calibration: Tensor, window: int = WINDOW) -> float:
    """Share, in [0, 1], of the non-overlapping evaluation windows that occur in the calibration tokens.

    evaluation: ids [n] or windows [w, length], read as one run of tokens, tail dropped; calibration: ids [m] or windows
    [w, length], each window apart. Texts shorter than `window` are compared by windows of their own length.
    """
    tokens = evaluation.reshape(-1).numpy().astype(np.uint64)
    rows = calibration.reshape(1, -1) if calibration.ndim == 1 else calibration
    window = min(window, len(tokens), rows.shape[1])
    if window == 0:
        return 0.0
    blocks = tokens[: len(tokens) // window * window].reshape(-1, window)
    hashes = _window_hashes(blocks, window)[:, 0]
    distinct = np.unique(hashes)
    found = _find(distinct, rows.numpy().astype(np.uint64), window)
    seen = sum(np.array_equal(blocks[i], found[h]) for i, h in enumerate(hashes.tolist()) if h in found)
    return seen / len(blocks)


def check_overlap(
    evaluation: Named,
    evaluation_ids: Tensor,
    calibration: Named,
    calibration_ids: Tensor,
    *,
    allow: bool = False,
) -> float:
    """`overlap_share` of two texts (1.0 for the same text). DataError above 1 % unless `allow`."""
    same = evaluation.digest == calibration.digest
    share = 1.0 if same else overlap_share(evaluation_ids, calibration_ids)
    if allow or share <= ALLOWED_SHARE:
        return share
    hint = "give a held-out text, or measure anyway with --allow-overlap (the report will say so)"
    if same:
        raise DataError(f"{evaluation.name} is used both for calibration and for evaluation", hint=hint)
    raise DataError(
        f"{share:.1%} of the {WINDOW}-token windows of {evaluation.name} occur in the calibration tokens of "
        f"{calibration.name}; at most {ALLOWED_SHARE:.0%} may",
        hint=hint,
    )


def _find(wanted: np.ndarray, rows: np.ndarray, window: int) -> dict[int, np.ndarray]:
    """One occurrence [window] in `rows` per hash in `wanted` (sorted) that occurs there."""
    found: dict[int, np.ndarray] = {}
    for row in rows:
        hashes = _window_hashes(row[None], window)[0]
        place = np.searchsorted(wanted, hashes)
        place[place == len(wanted)] = 0
        hits = np.flatnonzero(wanted[place] == hashes)
        for value, first in zip(*np.unique(hashes[hits], return_index=True), strict=True):
            start = int(hits[first])
            found.setdefault(int(value), row[start : start + window])
    return found


def _window_hashes(rows: np.ndarray, window: int) -> np.ndarray:
    """Hash of every window of every row: uint64 [r, n] -> [r, n - window + 1], sum_j (t[i+j] + 1) base^j mod 2^64.

    With prefix sums S_k = sum_{i<k} (t_i + 1) base^i, the hash at i is (S_{i+window} - S_i) base^-i.
    """
    columns = rows.shape[1]
    power = _powers(_BASE, columns)
    inverse = _powers(pow(_BASE, -1, 2**64), columns - window + 1)
    prefix = np.zeros((rows.shape[0], columns + 1), dtype=np.uint64)
    np.cumsum((rows + np.uint64(1)) * power, axis=1, out=prefix[:, 1:])
    return (prefix[:, window:] - prefix[:, : columns - window + 1]) * inverse


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)
