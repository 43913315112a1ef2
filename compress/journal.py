"""The journal of a run: who it belongs to, and what is finished and safe on disk.

`OUT.partial/journal.jsonl`: the first line is the identity of the run, every further line one finished unit of work
(a block of a stage, a whole stage, a phase of the export). A line is written only after its files are durable, and is
itself flushed to disk before the run goes on. A last line cut short by a kill does not count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ResumeError
from .failpoint import failpoint

NAME = "journal.jsonl"
_AFRESH = "start afresh with --overwrite"


class Journal:
    """Append-only record of finished work in the folder `partial`."""

    def __init__(self, partial: Path, identity: dict[str, Any]) -> None:
        self.path = partial / NAME
        self.identity = identity
        self._done: dict[str, dict[str, Any]] = {}

    @classmethod
    def start(cls, partial: Path, identity: dict[str, Any]) -> Journal:
        """Create `partial` and its journal. The folder must not exist."""
        partial.mkdir(parents=True)
        journal = cls(partial, identity)
        journal._append({"identity": identity})
        return journal

    @classmethod
    def resume(cls, partial: Path, identity: dict[str, Any]) -> Journal:
        """Open the journal of an earlier run. ResumeError names whatever differs from `identity`."""
        journal = cls(partial, identity)
        lines = journal._read()
        if not lines:
            raise ResumeError(f"{journal.path} holds no usable journal", hint=_AFRESH)
        _compare(lines[0]["identity"], identity)
        for line in lines[1:]:
            journal._done[line["done"]] = line["result"]
        journal._rewrite(lines)
        return journal

    def done(self, unit: str) -> dict[str, Any] | None:
        """The result of a finished unit, or None."""
        return self._done.get(unit)

    def finish(self, unit: str, result: dict[str, Any]) -> None:
        """Record that `unit` is finished. Its files must be on disk already."""
        failpoint("journal")
        self._append({"done": unit, "result": result})
        self._done[unit] = result

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ResumeError(f"{self.path} cannot be read: {error.strerror}", hint=_AFRESH) from error
        lines = []
        for number, row in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last line break was cut short
            try:
                line = json.loads(row)
            except ValueError as error:
                raise ResumeError(f"{self.path} is damaged in line {number}: {error}", hint=_AFRESH) from error
            if not _is_line(line, first=number == 1):
                raise ResumeError(f"{self.path} is damaged: line {number} is not one of a journal", hint=_AFRESH)
            lines.append(line)
        return lines

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Drop a line cut short, so that the next one starts on a line of its own."""
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)


def _is_line(line: Any, *, first: bool) -> bool:
    if not isinstance(line, dict):
        return False
    if first:
        return isinstance(line.get("identity"), dict)
    return isinstance(line.get("done"), str) and isinstance(line.get("result"), dict)


def begun(partial: Path) -> bool:
    """Whether `partial` is more than what a run leaves that was killed before its journal had a first line."""
    if not partial.is_dir():
        return partial.exists()
    if any(path.name != NAME for path in partial.iterdir()):
        return True
    journal = partial / NAME
    return journal.exists() and b"\n" in journal.read_bytes()


def _compare(before: Any, now: Any, name: str = "") -> None:
    """ResumeError that names the first difference inside two identities, plain data."""
    if before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            _compare(before.get(key), now.get(key), f"{name} {key}".strip())
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (a, b) in enumerate(zip(before, now, strict=True)):
            _compare(a, b, f"{name} {number}")
    else:
        raise ResumeError(
            f"the partial run had {name} = {_short(before)}, this one has {_short(now)}",
            hint="repeat the first command exactly and add --resume, or start afresh with --overwrite",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:96]} ..."
