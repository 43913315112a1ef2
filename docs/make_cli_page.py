"""Write docs/cli.md from the commands themselves: the same texts as `gossamer COMMAND --help`.

`python docs/make_cli_page.py` writes the page; a test compares it with what `page()` gives now.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from gossamer.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
_INTRODUCTION = """\
# Command line

Made by `make docs` from the commands themselves; the same texts as `gossamer COMMAND --help`.

Results go to stdout, progress and messages to stderr. Exit codes: 0; 2 for a mistake that the message names (`error:`
and `hint:` lines); 130 after Ctrl-C; 1 with a traceback for a fault of Gossamer. Options are accepted with underscores,
too.
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    parts = [_INTRODUCTION]
    for name, command in commands(group).items():
        parts.append(f"## gossamer {name}\n\n{_plain(command.help)}\n")
        parts += _tables(command)
        parts.append("```bash\n" + "\n".join(_examples(command.epilog)) + "\n```\n")
    return "\n".join(parts)


def commands(group: Any) -> dict[str, Any]:
    """All commands by name; those of a group as `group command`."""
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= {f"{name} {inner}": each for inner, each in commands(command).items()}
        else:
            found[name] = command
    return found


def _tables(command: Any) -> list[str]:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    tables = [_table("argument", [(param.metavar or param.name.upper(), param.help) for param in arguments])]
    panels = dict.fromkeys(getattr(param, "rich_help_panel", None) for param in options)
    for panel in panels:
        rows = [(_spelling(param), param.help) for param in options if getattr(param, "rich_help_panel", None) == panel]
        tables.append(_table(panel or "option", rows))
    return [table for table in tables if table]


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {title} | |", "|---|---|", *(f"| `{name}` | {_plain(text)} |" for name, text in rows)]
    return "\n".join(lines) + "\n"


def _spelling(option: Any) -> str:
    names = ", ".join(option.opts)
    return f"{names} {option.metavar}".replace("|", "\\|") if option.metavar else names


def _examples(epilog: str) -> list[str]:
    return [line.removeprefix("  $ ") for line in epilog.split("\n\n")[1:]]


def _plain(text: str) -> str:
    """Help text without the terminal's markup."""
    return re.sub(r"\\\[", "[", " ".join(text.split("\n"))).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
