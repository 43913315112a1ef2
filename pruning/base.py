"""The contract between one-shot methods and the driver: statistics in, weight and mask out.

A method sees one matrix at a time and no model. It names the statistics that it `needs`; the driver measures them in
one pass over the calibration text. Adding a method: one class as below in a file of its own, one line in `registry.py`;
the contract tests, the command line and the benchmark then pick it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ModelError
from .pattern import Pattern

LARGE = 2**30  # floating-point operations of one product with the Gram matrix from which on a matrix counts as large
PANEL = 768  # inputs per product where a Gram matrix' symmetry is made use of

Log = Callable[[str], None]


def silent(message: str) -> None:
    """The default log: drops the message."""


@dataclass(frozen=True)
class Holdout:
    """Tokens to choose between candidates: x [tokens, in] and y [tokens, out], float32.

    y is what `LayerStats.target` aims at, without bias. Statistics of the other tokens: gram - x^T x, target - y^T x.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class LayerStats:
    """What the calibration text says about one input of a linear map. x is the input that the pruned-so-far model sees.

    Attributes:
        tokens: number of token vectors summed over.
        norm: float32 [in]: sqrt(sum x_j^2).
        gram: float32 [in, in]: sum x x^T.
        target: float32 [out, in]: sum y x^T, with y the output to aim at, without bias. None means W @ gram.
        holdout: the last tenth of every window once more, token by token; they are in `gram` and `target` too.
        excess: float32 [out, in]: sum (y - W x) x^T = target - W gram, with the W that is to be pruned.
    """

    tokens: int
    norm: Tensor | None = None
    gram: Tensor | None = None
    target: Tensor | None = None
    holdout: Holdout | None = None
    excess: Tensor | None = None


class Method(Protocol):
    """A one-shot pruning method.

    A method that prunes another matrix than `weight` (say, one fitted to the dense model's outputs first) may have
    `prune_towards` besides: `prune` with that dense matrix, float32 [out, in], as a third result. The errors in the
    report then refer to it.

    Attributes:
        name: its key in the registry.
        needs: statistics that must not be None, of "norm", "gram", "target", "holdout". With "excess" besides "target"
            the driver may give the excess instead of the target, which saves it a product or two per large matrix.
        order: "block": all statistics of a decoder block at once; "input": measured again after each group of matrices
            that share an input.
        scope: "row" or "matrix": the unit of comparison of an unstructured pattern when the user names none. Both must
            be honoured when asked for.
    """

    name: str
    needs: frozenset[str]
    order: str
    scope: str

    def prune(self, weight: Tensor, stats: LayerStats, pattern: Pattern, log: Log = silent) -> tuple[Tensor, Tensor]:
        """Prune one matrix.

        Args:
            weight: [out, in], any float dtype. Not modified, like everything in `stats`.
            stats: at least what `needs` names.
            pattern: must fit the shape (`pattern.check`).
            log: told about fallbacks, one sentence each.

        Returns:
            The new weight, float32 [out, in], +0.0 wherever pruned; and the mask, bool [out, in], True = kept, with
            exactly `pattern.zeros(out, in)` False. At zero zeros the weight comes back bit for bit.

        Raises:
            ModelError: the weight or the statistics are not finite.
        """
        ...


def is_large(rows: int, cols: int) -> bool:
    """Whether a weight [rows, cols] is so large that its products with the Gram matrix have to be counted."""
    return 2 * rows * cols**2 > LARGE


def prepare(weight: Tensor, stats: LayerStats, needs: frozenset[str], pattern: Pattern) -> Tensor:
    """The checks that every method starts with; a float32 copy of the weight that may be modified.

    Raises:
        ModelError: NaN or infinite entries.
        RecipeError: the pattern does not fit the shape.
        ValueError: a statistic is missing or has the wrong shape.
    """
    rows, cols = weight.shape
    pattern.check(rows, cols, "the matrix")
    _check_finite(weight, "the weight", "the checkpoint is damaged, or its dtype overflows")
    shapes = {"norm": (cols,), "gram": (cols, cols), "target": (rows, cols)}
    for name in sorted(needs & shapes.keys()):
        value = getattr(stats, name)
        if value is None:
            raise ValueError(f"the statistic {name!r} is needed but was not measured")
        if tuple(value.shape) != shapes[name]:
            raise ValueError(f"the statistic {name!r} must be {list(shapes[name])}, got {list(value.shape)}")
        _check_finite(value, f"the statistic {name!r}", "activations overflow; calibrate with --dtype float32")
    return weight.to(torch.float32, copy=True)


def select(weight: Tensor, scores: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Keep the entries that `pattern` picks by score; no weight changes. `weight` float32, from `prepare`."""
    keep = pattern.mask(scores)
    return weight.masked_fill_(~keep, 0.0), keep


def relative_error(weight: Tensor, pruned: Tensor, stats: LayerStats) -> float:
    """||(W - W') X||^2 / ||W X||^2 on the calibration inputs, from the Gram matrix: tr(D G D^T) / tr(W G W^T).

    Without a Gram matrix its diagonal is taken (from `norm`), without any statistic the identity. 0 / 0 is 0.
    """
    return relative_errors(weight, [pruned], stats)[0]


def relative_errors(weight: Tensor, pruned: Sequence[Tensor], stats: LayerStats) -> list[float]:
    """`relative_error` of several candidates; ||W X||^2 is computed once."""
    dense = weight.to(torch.float32)
    whole = _energy(dense, stats)
    changes = [_energy(dense - candidate.to(torch.float32), stats) for candidate in pruned]
    if whole > 0:
        return [change / whole for change in changes]
    return [0.0 if change == 0 else math.inf for change in changes]


def _energy(matrix: Tensor, stats: LayerStats) -> float:
    """tr(A G A^T), a slab of rows at a time; rows are summed in float64."""
    total = 0.0
    for slab in matrix.split(1024):
        if stats.gram is not None:
            rows = _quadratic_form(slab, stats.gram)
        elif stats.norm is not None:
            rows = torch.linalg.vector_norm(slab * stats.norm, dim=1).square_()
        else:
            rows = torch.linalg.vector_norm(slab, dim=1).square_()
        total += float(rows.sum(dtype=torch.float64))
    return max(total, 0.0)


def _quadratic_form(slab: Tensor, gram: Tensor) -> Tensor:
    """a G a^T of every row a, float32 [rows]. G is symmetric: what lies left of a panel's diagonal block counts twice.

    Half of the products of slab @ G, or little more.
    """
    total = slab.new_zeros(len(slab))
    for first in range(0, len(gram), PANEL):
        last = min(first + PANEL, len(gram))
        product = slab[:, first:last] @ gram[first:last, first:]
        own, right = product[:, : last - first], product[:, last - first :]
        total += torch.linalg.vecdot(own, slab[:, first:last])
        if last < len(gram):
            total += 2 * torch.linalg.vecdot(right, slab[:, last:])
    return total


def _check_finite(tensor: Tensor, what: str, hint: str) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = tensor.numel() - int(finite.sum())
        raise ModelError(f"{what} has {bad} NaN or infinite entries of {tensor.numel()}", hint=hint)
