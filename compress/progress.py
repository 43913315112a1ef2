"""What a running job tells whoever watches it. The command line prints it on stderr; the default stays silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..finetune.training import StepDone


@dataclass(frozen=True)
class BlockDone:
    """One finished decoder block of a stage. `error`: mean relative output error, None when not measured."""

    stage: str
    block: int
    blocks: int
    name: str
    error: float | None
    sparsity: float | None
    seconds: float
    seconds_left: float


class Progress:
    """Receives events; every method may be overridden, and none has to be."""

    def stage(self, name: str, blocks: int) -> None:
        """A stage with this many blocks begins."""

    def working(self, text: str) -> None:
        """What is being done inside a block right now (a short phrase)."""

    def block(self, event: BlockDone) -> None:
        """A block is finished and safe on disk."""

    def windows(self, label: str, done: int, total: int, seconds_left: float, unit: str = "windows") -> None:
        """So many windows, or other units, of a phase without blocks (embeddings, output matrix) are finished."""

    def step(self, label: str, event: StepDone) -> None:
        """Some more optimizer steps of a training run are done."""

    def note(self, text: str) -> None:
        """Something the user should know and that also goes into the report."""


class Recorder(Progress):
    """Passes events on and keeps the notes, for the report."""

    def __init__(self, inner: Progress) -> None:
        self.inner = inner
        self.notes: list[str] = []

    def stage(self, name: str, blocks: int) -> None:
        self.inner.stage(name, blocks)

    def working(self, text: str) -> None:
        self.inner.working(text)

    def block(self, event: BlockDone) -> None:
        self.inner.block(event)

    def windows(self, label: str, done: int, total: int, seconds_left: float, unit: str = "windows") -> None:
        self.inner.windows(label, done, total, seconds_left, unit)

    def step(self, label: str, event: StepDone) -> None:
        self.inner.step(label, event)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.inner.note(text)
