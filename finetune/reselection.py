"""When positions are chosen anew and how many: pure functions of the number of finished updates.

After Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024, with one difference: windows are all
equally long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import RecipeError

ANNEALS = ("linear", "cosine")


@dataclass(frozen=True)
class Reselection:
    """Positions are chosen after updates `window`, `window + interval`, `window + 2 interval` and so on.

    Attributes:
        interval: updates between two choices.
        window: the last updates before a choice, during which gradients of positions without an entry are summed.
        look_every: of these updates, one in so many forms the gradient of a whole matrix.
        share: of the entries that the choice at the beginning replaces.
        anneal: how the share falls to 0 at `total` updates: "linear", or "cosine".
        total: updates of the training.
        first: share of the very first choice; 1 replaces a random start completely.
    """

    interval: int
    window: int
    look_every: int
    share: float
    anneal: str
    total: int
    first: float

    def __post_init__(self) -> None:
        check_schedule(self.interval, self.window, self.look_every, self.share, self.anneal)
        if self.total < 1:
            raise RecipeError(f"the number of updates must be at least 1, got {self.total}")

    def is_due(self, done: int) -> bool:
        """Whether positions are chosen after update number `done` (from 1)."""
        return done >= self.window and (done - self.window) % self.interval == 0 and self.replaced(done) > 0

    def is_open(self, done: int) -> bool:
        """Whether the update that follows `done` finished ones lies in a window whose choice will happen."""
        ahead = self.choice_after(done)
        return ahead - done <= self.window and self.replaced(ahead) > 0

    def looks(self, done: int, matrix: int) -> bool:
        """Whether the update that follows `done` finished ones of a window looks at matrix number `matrix`.

        Matrices take turns, so that every update costs about as much, and each is looked at as early and as often.
        """
        turns = min(self.look_every, self.window)
        return (done + self.window - self.choice_after(done)) % turns == matrix % turns

    def choice_after(self, done: int) -> int:
        """The number of finished updates at the next choice."""
        if done < self.window:
            return self.window
        return done + self.interval - (done - self.window) % self.interval

    def replaced(self, done: int) -> float:
        """Share of the entries that the choice after `done` updates replaces."""
        if done >= self.total:
            return 0.0
        if done == self.window:
            return self.first
        if self.anneal == "linear":
            return self.share * (1 - done / self.total)
        return self.share * (1 + math.cos(math.pi * done / self.total)) / 2


def window_of(interval: int, window: int | None) -> int:
    """As long as the interval, where none is given."""
    return interval if window is None else window


def check_schedule(interval: int, window: int, look_every: int, share: float | None, anneal: str) -> None:
    """RecipeError for what cannot be a schedule; a share of None is left to the policy."""
    if look_every < 1:
        raise RecipeError(f"look_every must be at least 1, got {look_every}")
    if not 1 <= window <= interval:
        raise RecipeError(
            f"a window of {window} updates every {interval} is not allowed; 1 <= window <= interval",
            hint="gradients are looked at during the last `window` of every `interval` updates",
        )
    if share is not None and not 0 < share <= 1:
        raise RecipeError(f"the share that is replaced must be in (0, 1], got {share:g}")
    if anneal not in ANNEALS:
        raise RecipeError(f"anneal {anneal!r} is unknown; allowed: {', '.join(ANNEALS)}")
