"""What is made once from a packed tensor, such as an index for the GPU, and kept while the packed memory lives."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from .record import Record

T = TypeVar("T")


class Derived(Generic[T]):
    """One thing per packing record, so made anew after a write or a move.

    Records hold their memory weakly. Things of memory that is gone go when the next one is made.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Record, T]] = {}  # by the number of the packed memory
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, record: Record, make: Callable[[], T]) -> T:
        known = self._known.get(record.memory.cdata)
        if known is not None and known[0] is record:
            return known[1]
        with self._lock:
            for key in [key for key, (old, _) in self._known.items() if old.memory.expired()]:
                del self._known[key]
        made = make()
        with self._lock:
            self._known[record.memory.cdata] = (record, made)
        return made
