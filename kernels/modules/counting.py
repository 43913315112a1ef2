"""How much of the weights was skipped, as the kernels counted it. Off unless somebody counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Tally:
    """Elements of one matrix that calls read, and would have read dense. `read` may hold counts that lie on a GPU."""

    every: int = 0
    read: int = 0
    later: list[tuple[Tensor, int]] = field(default_factory=list)

    def add(self, count: int | Tensor, each: int, every: int, extra: int = 0) -> None:
        """A call that read `count` times `each` elements and `extra` more, where a dense one reads `every`."""
        self.every += every
        self.read += extra
        if isinstance(count, Tensor):
            self.later.append((count, each))
        else:
            self.read += count * each

    def settle(self) -> None:
        """Fetch what lies on a GPU."""
        self.read += sum(int(count) * each for count, each in self.later)
        self.later.clear()

    @property
    def skipped(self) -> float:
        """Share of the elements that were not read."""
        self.settle()
        return 1.0 - self.read / self.every if self.every else 0.0


class Counts(dict[int, Tally]):
    """Tallies by id of the module. `steps`: calls of the model with sparse tokens."""

    steps = 0

    def of(self, module: object) -> Tally:
        found = self.get(id(module))
        if found is None:
            found = self[id(module)] = Tally()
        return found


_counts: ContextVar[Counts | None] = ContextVar("counts", default=None)


def counts() -> Counts | None:
    """Where this thread counts, None where it does not."""
    return _counts.get()


@contextmanager
def counting() -> Iterator[Counts]:
    """Inside the block, products of this thread that skip are counted."""
    made = Counts()
    token = _counts.set(made)
    try:
        yield made
    finally:
        _counts.reset(token)
