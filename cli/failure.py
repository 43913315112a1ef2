"""Where expected failures become one line, a hint and an exit code. Anything else keeps its traceback."""

from __future__ import annotations

import errno
import os
import shlex
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import GossamerError

INTERRUPTED = 130
_RESUMABLE = {
    "compress": "after the last finished block or from the last checkpoint",
    "finetune": "from the last checkpoint",
}
_STORAGE = {
    errno.ENOSPC: "free disk space, or choose another folder",
    errno.EDQUOT: "free disk space, or choose another folder",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another disk",
    errno.EACCES: "choose a folder that you may read and write",
    errno.EPERM: "choose a folder that you may read and write",
    errno.EROFS: "choose a folder on a writable disk",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
}


class Application(TyperGroup):
    """The command group: keeps the arguments as they were typed and turns expected failures into messages."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GossamerError as error:
            raise _exit(error.message, error.hint, error.exit_code, alone=error.alone) from error
        except KeyboardInterrupt as error:
            raise _exit("interrupted", _how_to_go_on(ctx.obj), INTERRUPTED) from error
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise _exit(f"{where}{error.strerror}", _STORAGE[error.errno], GossamerError.exit_code) from error


def typed_command(ctx: typer.Context) -> str:
    """The command line as it was typed, for the model card; the value of --token is left out."""
    words: list[str] = []
    hide = False
    for word in ctx.find_root().obj or []:
        name, equals, _ = word.partition("=")
        if hide:
            words.append("...")
        else:
            words.append("--token=..." if name == "--token" and equals else word)
        hide = word == "--token" and not hide
    return shlex.join(["gossamer", *words])


def _exit(message: str, hint: str | None, code: int, *, alone: bool = False) -> typer.Exit:
    """Of several processes with one failure, the first tells it."""
    from .console import show_error

    if alone or os.environ.get("RANK", "0") == "0":
        show_error(message, hint)
    return typer.Exit(code)


def _how_to_go_on(words: list[str]) -> str | None:
    if not words or words[0] not in _RESUMABLE:
        return None
    return f"repeat the command with --resume to go on {_RESUMABLE[words[0]]}"
