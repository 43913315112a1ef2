"""Sparsity patterns: how many entries go, which unit they are compared in, and the mask that a score matrix gives.

A weight is always [out, in]. N:M keeps N of every M consecutive *input* features of one output row. Selection is by
rank with an exact count; among equal scores the lower index is kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Union

from torch import Tensor

from ..errors import RecipeError
from .selection import cheapest_counts, keep_all_but, keep_all_but_per_row, keep_blocks, keep_in_groups, spread

SCOPES = ("row", "matrix", "model")
DEFAULT_SPARSITY = 0.5
_WHAT_IS_ALLOWED = "a sparsity in [0, 1) such as 0.5, an N:M pattern such as 2:4, or a block pattern such as block:4x8"


@dataclass(frozen=True)
class Unstructured:
    """round(sparsity * rows * cols) zeros anywhere.

    `scope` says which scores are compared: those of one output row (row counts differ by at most one; where the total
    is no multiple, the rows with the cheapest next entry lose one more), of one matrix, or of the whole model. "model"
    must be turned into one exact "matrix" pattern per matrix first (`for_count`, counts from
    `allocation.global_counts`). Sparsity 1 is not a user's choice, but a global threshold may empty a matrix.
    """

    sparsity: float
    scope: str = "row"

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity, allow_one=True)
        if self.scope not in SCOPES:
            raise RecipeError(f"scope {self.scope!r} is unknown; allowed: {', '.join(SCOPES)}")

    @classmethod
    def for_count(cls, zeros: int, rows: int, cols: int) -> Unstructured:
        """The matrix-scope pattern whose `zeros(rows, cols)` is exactly `zeros`."""
        return cls(zeros / (rows * cols), "matrix")

    def zeros(self, rows: int, cols: int) -> int:
        return round(self.sparsity * rows * cols)

    def row_zeros(self, rows: int, cols: int) -> Tensor:
        """Zeros of each row under scope "row" where no scores decide who gets one more, int64 [rows]."""
        return spread(self.zeros(rows, cols), rows)

    def mask(self, scores: Tensor) -> Tensor:
        rows, cols = scores.shape
        if self.scope == "row":
            return keep_all_but_per_row(scores, cheapest_counts(scores, self.zeros(rows, cols)))
        if self.scope == "matrix":
            return keep_all_but(scores, self.zeros(rows, cols))
        raise ValueError("scope 'model' has no mask for one matrix; use Unstructured.for_count per matrix")

    def check(self, rows: int, cols: int, name: str) -> None:
        """Fits every shape."""

    def __str__(self) -> str:
        return repr(float(self.sparsity))


@dataclass(frozen=True)
class NM:
    """Keep `keep` of every `group` consecutive input features of a row."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.group:
            raise RecipeError(
                f"pattern {self} keeps {self.keep} of every {self.group}; allowed: 1 <= N <= M in N:M",
                hint="N is the number of weights kept, so 1:4 is 75 % sparse",
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.group

    def zeros(self, rows: int, cols: int) -> int:
        return rows * (cols // self.group) * (self.group - self.keep)

    def mask(self, scores: Tensor) -> Tensor:
        return keep_in_groups(scores, self.keep, self.group)

    def check(self, rows: int, cols: int, name: str) -> None:
        """RecipeError unless the group divides the number of inputs."""
        if cols % self.group:
            raise RecipeError(
                f"pattern {self} does not fit {name}: its {cols} inputs are not a multiple of {self.group}",
                hint=f"{_exclude(name)}, or take an M that divides {cols}{_divisors(cols)}",
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class Block:
    """Whole blocks of `rows` outputs x `cols` inputs go: round(sparsity * number of blocks) of them."""

    rows: int
    cols: int
    sparsity: float = DEFAULT_SPARSITY

    def __post_init__(self) -> None:
        if min(self.rows, self.cols) < 1:
            raise RecipeError(
                f"block size {self.rows}x{self.cols} is not allowed; both must be at least 1",
                hint="block:4x8 has 4 outputs and 8 inputs",
            )
        _check_sparsity(self.sparsity)

    def zero_blocks(self, rows: int, cols: int) -> int:
        return round(self.sparsity * (rows // self.rows) * (cols // self.cols))

    def zeros(self, rows: int, cols: int) -> int:
        return self.zero_blocks(rows, cols) * self.rows * self.cols

    def mask(self, scores: Tensor) -> Tensor:
        return keep_blocks(scores, self.rows, self.cols, self.zero_blocks(*scores.shape))

    def check(self, rows: int, cols: int, name: str) -> None:
        """RecipeError unless blocks tile the matrix."""
        if rows % self.rows or cols % self.cols:
            raise RecipeError(
                f"pattern block:{self.rows}x{self.cols} does not fit {name}: "
                f"{rows} outputs x {cols} inputs cannot be tiled",
                hint=f"{_exclude(name)}, or take a block size that divides {rows}x{cols}",
            )

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}:{float(self.sparsity)!r}"


Pattern = Union[Unstructured, NM, Block]


def parse_pattern(text: str, scope: str = "row") -> Pattern:
    """The pattern that `str()` writes: "0.5" (with `scope`), "2:4", "block:4x8" (half) or "block:4x8:0.7".

    Raises:
        RecipeError: anything else, a sparsity outside [0, 1), N > M, or an unknown scope.
    """
    text = text.strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"block:(\d+)x(\d+)(?::(.+))?", text):
        sparsity = DEFAULT_SPARSITY if match[3] is None else _number(match[3], text)
        return Block(int(match[1]), int(match[2]), sparsity)
    sparsity = _number(text, text)
    _check_sparsity(sparsity)
    return Unstructured(sparsity, scope)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(
            f"pattern {whole!r} is not understood; allowed: {_WHAT_IS_ALLOWED}",
            hint="N:M keeps N of every M inputs; block:RxC removes whole blocks of R outputs and C inputs",
        ) from None


def _check_sparsity(value: float, allow_one: bool = False) -> None:
    if not (0 <= value < 1 or (allow_one and value == 1)) or math.isnan(value):
        raise RecipeError(
            f"sparsity must be in [0, 1), got {value:g}",
            hint="it is the fraction of zeros: 0.5 removes half of the weights",
        )


def _exclude(name: str) -> str:
    return f"leave it out with --exclude {name.rsplit('.', 1)[-1]}"


def _divisors(cols: int) -> str:
    fitting = [str(m) for m in (2, 4, 8, 16) if cols % m == 0]
    return f", such as {', '.join(fitting)}" if fitting else ""
