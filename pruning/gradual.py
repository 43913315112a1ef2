"""Gradual magnitude pruning: the mask tightens while the model trains, along a cubic curve.

s(t) = s_f + (s_0 - s_f) (1 - (t - t_0) / (t_1 - t_0))^3 for t_0 <= t <= t_1, and s_f after t_1.

Zhu and Gupta, "To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression", 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RecipeError


@dataclass(frozen=True)
class Cubic:
    """A schedule over optimizer steps: `final` is reached at step `end`; afterwards the mask is frozen.

    Attributes:
        final: sparsity at `end`.
        begin: step t_0 of the first tightening.
        end: step t_1 of the last one.
        every: steps between two tightenings.
        initial: s_0, what is pruned before.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final < 1:
            raise RecipeError(
                f"sparsity must rise inside [0, 1), got {self.initial:g} to {self.final:g}",
                hint="masks may only shrink: give a final sparsity above what is pruned already",
            )
        if not 0 <= self.begin <= self.end or self.every < 1:
            raise RecipeError(
                f"the schedule needs 0 <= begin <= end and every >= 1, got begin {self.begin}, end {self.end}, "
                f"every {self.every}",
                hint="begin 0, end at three quarters of the steps and every 10 are usual",
            )

    def sparsity(self, step: int) -> float:
        """s(step), in [initial, final]."""
        if step >= self.end:
            return self.final
        if step < self.begin:
            return self.initial
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**3

    def tightens(self, step: int) -> bool:
        """Whether the mask changes after optimizer step `step`: at begin, every `every` steps, and at end."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def holds(self, step: int) -> float:
        """The sparsity of the mask in force after `step`: that of the last tightening. Resuming needs no more."""
        if step >= self.end:
            return self.final
        if step < self.begin:
            return self.initial
        return self.sparsity(step - (step - self.begin) % self.every)
