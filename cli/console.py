"""What people see: progress on stderr, tables on stdout, errors as one line and a hint."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..compress.progress import BlockDone, Progress

if TYPE_CHECKING:
    from ..compress.progress import StepDone

PIPE_WIDTH = 160
BETWEEN_LINES = 10.0  # seconds


class ConsoleProgress(Progress):
    """One line per finished block on stderr; on a terminal also what is being done right now."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._status = self.console.status("starting")
        self._live = self.console.is_terminal
        self._printed = time.monotonic()

    def __enter__(self) -> ConsoleProgress:
        if self._live:
            self._status.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._status.stop()

    def stage(self, name: str, blocks: int) -> None:
        self.console.print(f"{name}: {blocks} blocks")

    def working(self, text: str) -> None:
        if self._live:
            self._status.update(text)

    def block(self, event: BlockDone) -> None:
        self._printed = time.monotonic()
        parts = [f"{event.stage} {event.block + 1}/{event.blocks} {event.name}"]
        if event.error is not None:
            parts.append(f"error {event.error:.3e}")
        if event.sparsity is not None:
            parts.append(f"sparsity {100 * event.sparsity:.2f} %")
        parts.append(f"{event.seconds:.1f} s")
        if event.block + 1 < event.blocks:
            parts.append(f"{duration(event.seconds_left)} left")
        self.console.print(Text("  ".join(parts)))

    def windows(self, label: str, done: int, total: int, seconds_left: float, unit: str = "windows") -> None:
        """Every few seconds, and at the end."""
        now = time.monotonic()
        self.working(f"{label} {done}/{total}")
        if done < total and now - self._printed < BETWEEN_LINES:
            return
        self._printed = now
        left = f"  {duration(seconds_left)} left" if done < total else ""
        self.console.print(Text(f"{label} {done}/{total} {unit}{left}"))

    def step(self, label: str, event: StepDone) -> None:
        """On a terminal every report, else one every few seconds, and the last."""
        parts = [f"{label} {event.step}/{event.steps}", f"loss {event.loss:.4f}", f"lr {event.learning_rate:.2e}"]
        if event.sparsity is not None:
            parts.append(f"sparsity {100 * event.sparsity:.2f} %")
        parts += [f"{name} {value:.4g}" for name, value in event.more.items()]
        parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
        if event.step < event.steps:
            parts.append(f"{duration(event.seconds_left)} left")
        self.working("  ".join(parts))
        now = time.monotonic()
        if event.step < event.steps and now - self._printed < BETWEEN_LINES:
            return
        self._printed = now
        self.console.print(Text("  ".join(parts)))

    def note(self, text: str) -> None:
        self.console.print(Text(f"note: {text}"))


class SilentProgress(Progress):
    """For `--quiet`."""

    def __enter__(self) -> SilentProgress:
        return self

    def __exit__(self, *failure: object) -> None:
        return None


def watch(quiet: bool) -> ConsoleProgress | SilentProgress:
    """The progress of a command, as a context manager."""
    return SilentProgress() if quiet else ConsoleProgress()


def hush_libraries(quiet: bool = True) -> None:
    """Switch off the progress bars of transformers and the hub client. Works only before they are imported."""
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def duration(seconds: float) -> str:
    """75 as "1 m 15 s"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} m"
    return f"{minutes} m {rest:02d} s" if minutes else f"{rest} s"


def show_table(
    title: str | None, header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1
) -> None:
    """Print a table on stdout; columns from `numbers_from` on are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index >= numbers_from else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:  # in a file or a pipe nothing should be folded at a terminal's 80 columns
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(table)


def show_lines(lines: Iterable[str]) -> None:
    """Print plain lines on stdout."""
    for line in lines:
        typer.echo(line)


def show_json(document: Any) -> None:
    """Print one JSON document on stdout. JSON knows no infinity: such a number becomes null."""
    typer.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def show_note(text: str) -> None:
    """`note:` on stderr."""
    typer.echo(f"note: {text}", err=True)


def show_error(message: str, hint: str | None = None) -> None:
    """`error:` and `hint:`, one line each, on stderr."""
    typer.echo(f"error: {one_line(message)}", err=True)
    if hint:
        typer.echo(f"hint: {one_line(hint)}", err=True)


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
