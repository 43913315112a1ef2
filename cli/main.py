"""The application: one command per file, nothing heavy imported before a command runs."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Annotated, Any

import typer

from .. import __version__
from . import (
    adapter,
    bench,
    compress,
    convert,
    demo,
    env,
    evaluate,
    finetune,
    generate,
    inspect,
    methods,
    plan_heads,
    soup,
    windows,
)  # fmt: skip
from .failure import Application
from .options import examples

SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda word: word.replace("_", "-"),  # --max_memory is --max-memory
}

# at every import bitsandbytes says that it lacks an optional kernel, which nothing here needs
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

app = typer.Typer(
    name="gossamer",
    cls=Application,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
    epilog=examples(
        "gossamer demo demo-model",
        "gossamer compress demo-model -o demo-sparse --calibration demo-model/calibration.txt "
        "--eval demo-model/heldout.txt",
    ),
)
_MODULES = (
    compress, finetune, adapter, soup, plan_heads, evaluate, generate, inspect, convert, windows, methods, env, demo,
    bench,
)  # fmt: skip
for _module in _MODULES:
    _module.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def _gossamer(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Make HuggingFace language models sparse, and make the sparsity pay."""


@cache
def command() -> Any:
    """All commands with their options: 0.1 s to put together, once per process."""
    return typer.main.get_command(app)


def main() -> None:
    """Entry point of the command `gossamer`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command()(prog_name="gossamer")


if __name__ == "__main__":
    main()
