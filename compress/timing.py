"""Seconds per unit of work, and how many are left."""

from __future__ import annotations

import time


class Clock:
    """Counts equal units of work; `tick` after each one."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.finished = 0
        self.started = self.last = time.monotonic()

    def skip(self) -> None:
        """A unit that costs nothing (already done): it does not count for the estimate."""
        self.units -= 1
        self.last = time.monotonic()

    def tick(self) -> tuple[float, float]:
        """(seconds of this unit, estimated seconds left)."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        self.finished += 1
        left = (now - self.started) / self.finished * (self.units - self.finished)
        return seconds, max(left, 0.0)
