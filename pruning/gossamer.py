"""Gossamer's own one-shot method: dense targets, ADMM mask, exact swaps, conjugate gradient on the support.

The pruned model feeds every matrix inputs x that differ from the dense ones, so the best map is not the old weight W
but the regression of the dense output y on x. With G = sum x x^T and T = sum y x^T (`LayerStats.gram`, `.target`):

    W* = W + beta (T - W G) (G + lambda I)^-1            the dense weight to aim at
    minimise tr((P - W*) (G + mu I) (P - W*)^T)          over P in the pattern

lambda, beta and mu guard against too few tokens: the last tenth of every window is held out, each is chosen by the
error there of a solution made from the other tokens (`heldout.py`), then everything is solved again on all tokens. The
second line is scaled to a unit diagonal and solved by ADMM (`admm.py`), conjugate gradient (`support.py`) and single
swaps (`swap.py`) in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .admm import admm_mask
from .base import LayerStats, Log, is_large, prepare, silent
from .gram import unit_diagonal
from .heldout import choose_damping, choose_target, split_statistics
from .pattern import NM, Block, Pattern, Unstructured
from .support import Slab, solve_on_support
from .swap import refine, refine_slab


@dataclass(frozen=True)
class Effort:
    """Iteration counts of the solver.

    Attributes:
        penalties: ADMM's rho, relative to the unit diagonal.
        steps: ADMM projections per penalty.
        iterations: conjugate gradient iterations before, between and after the rounds of swaps.
        tracked: the gradient is updated with every change. Otherwise a product makes it anew before every stage, which
            keeps rounding out of long runs.
        probe_rows: rows on which the held-out choices are made.
        probe_iterations: conjugate gradient iterations there for every damping.
    """

    penalties: tuple[float, ...]
    steps: int
    iterations: tuple[int, ...]
    tracked: bool
    probe_rows: int
    probe_iterations: int


THOROUGH = Effort((0.1, 0.6, 4.0), 8, (20, 20, 30), tracked=False, probe_rows=256, probe_iterations=10)
QUICK = Effort((1.0,), 3, (2, 6), tracked=True, probe_rows=128, probe_iterations=6)
SLAB = 512  # rows that go through QUICK's stages at once


@dataclass(frozen=True)
class Options:
    """Constants of the method; none was fitted to a model.

    Attributes:
        effort: iteration counts; None takes THOROUGH for small matrices and QUICK for large ones (about 15 products
            with the Gram matrix). The choice depends on the shape alone.
        candidates: entries per row and side that a round of swaps considers.
        balance: under scope "matrix" rows are divided by norm^balance before entries compete. 0 lets loud outputs take
            the budget, 1 comes near an equal share for every row.
        target_dampings: candidates for lambda, in units of the mean diagonal of G.
        dampings: candidates for mu, in the same units; the first is used when nothing is held out.
    """

    effort: Effort | None = None
    candidates: int = 32
    balance: float = 0.5
    target_dampings: tuple[float, ...] = (0.01, 0.1, 1.0)
    dampings: tuple[float, ...] = (0.01, 0.1)

    def effort_for(self, rows: int, cols: int) -> Effort:
        """The effort for a matrix [rows, cols]."""
        return self.effort or (QUICK if is_large(rows, cols) else THOROUGH)


@dataclass(frozen=True)
class Gossamer:
    """The entries that ADMM keeps, refined by swaps; their values are solved anew.

    Statistics are measured again after every input group, with the dense model's outputs as target.
    """

    options: Options = field(default_factory=Options)

    name = "gossamer"
    needs = frozenset({"gram", "target", "excess", "holdout"})
    order = "input"
    scope = "matrix"

    def prune(self, weight: Tensor, stats: LayerStats, pattern: Pattern, log: Log = silent) -> tuple[Tensor, Tensor]:
        """See `Method.prune`. Without a target or held-out tokens (experts) W* = W and mu is the first damping."""
        values, keep, _ = self.prune_towards(weight, stats, pattern, log)
        return values, keep

    def prune_towards(
        self, weight: Tensor, stats: LayerStats, pattern: Pattern, log: Log = silent
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and W*, float32 [out, in]."""
        dense = prepare(weight, stats, frozenset({"gram"}), pattern)
        rows, cols = dense.shape
        zeros = pattern.zeros(rows, cols)
        if zeros == 0:
            return dense, torch.ones_like(dense, dtype=torch.bool), dense
        if zeros == rows * cols:
            return torch.zeros_like(dense), torch.zeros_like(dense, dtype=torch.bool), dense
        assert stats.gram is not None
        level = float(stats.gram.diagonal().mean(dtype=torch.float64))
        if level <= 0:
            log("all calibration inputs are zero; weights are compared by magnitude, none is adjusted")
            keep = pattern.mask(dense.abs())
            return dense.masked_fill(~keep, 0.0), keep, dense
        effort = self.options.effort_for(rows, cols)
        goal, damping = self._goal(dense, stats, pattern, effort, level, log)
        del dense
        scale, gram = unit_diagonal(stats.gram, damping * level)
        values, keep = self._solve(goal.mul_(scale), gram, pattern, effort)
        del gram
        return values.div_(scale).masked_fill_(~keep, 0.0), keep, goal.div_(scale)

    def _goal(
        self, dense: Tensor, stats: LayerStats, pattern: Pattern, effort: Effort, level: float, log: Log
    ) -> tuple[Tensor, float]:
        """W* (made in place in `dense`) and mu."""
        split = split_statistics(dense, stats, effort.probe_rows, log)
        if split is None:
            return dense, self.options.dampings[0]
        goal, probe = choose_target(dense, stats, split, self.options.target_dampings, level)
        assert stats.gram is not None
        norm = stats.gram.diagonal().clamp_min(0).sqrt()
        if isinstance(pattern, Block):  # whole blocks of rows compete
            keep = pattern.mask(goal.abs() * norm)[split.rows]
        else:
            keep = pattern.mask(goal[split.rows].abs() * norm)
        return goal, choose_damping(probe, keep, split, self.options.dampings, level, effort.probe_iterations)

    def _solve(self, goal: Tensor, gram: Tensor, pattern: Pattern, effort: Effort) -> tuple[Tensor, Tensor]:
        """The pruned weight and its mask, in the scaled coordinates."""
        loudness = row_loudness(goal, self.options.balance) if _across_rows(pattern) else None
        values, keep = admm_mask(goal, gram, pattern, effort.penalties, effort.steps, loudness)
        swaps = None
        if not isinstance(pattern, Block):
            swaps = partial(
                refine_slab if effort.tracked else refine,
                group=pattern.group if isinstance(pattern, NM) else None,
                candidates=self.options.candidates,
            )
        if effort.tracked:
            _polish(values, keep, goal, gram, effort.iterations, swaps)
            return values, keep
        first, *rest = effort.iterations
        values = solve_on_support(values, goal, gram, keep, first)
        for iterations in rest:
            if swaps is not None:
                swaps(values, keep, goal, gram)
            values = solve_on_support(values, goal, gram, keep, iterations)
        return values, keep


def _polish(
    values: Tensor,
    keep: Tensor,
    goal: Tensor,
    gram: Tensor,
    iterations: Sequence[int],
    swaps: Callable[..., int] | None,
) -> None:
    """Conjugate gradient and swaps in turns, in place on `values` and `keep`; a few rows go through all of it at once.

    The gradient follows every change, so that beside the iterations themselves only the first one costs a product.
    """
    slab = Slab(min(SLAB, len(values)), values)
    first, *rest = iterations
    for start in range(0, len(values), SLAB):
        rows = slice(start, start + SLAB)
        slab.begin(values[rows], goal[rows], gram, keep[rows])
        slab.descend(first)
        for count in rest:
            if swaps is not None:
                swaps(slab.values, slab.keep, slab.gradient, gram)
            slab.descend(count)


def row_loudness(weight: Tensor, balance: float) -> Tensor:
    """norm^balance of every row relative to the mean norm, float32 [out, 1]; 1 for rows of zeros."""
    norm = weight.norm(dim=1, keepdim=True)
    relative = norm / norm.mean().clamp_min(torch.finfo(norm.dtype).tiny)
    return relative.where(relative > 0, torch.ones_like(relative)).pow(balance)


def _across_rows(pattern: Pattern) -> bool:
    return isinstance(pattern, Unstructured) and pattern.scope == "matrix"
