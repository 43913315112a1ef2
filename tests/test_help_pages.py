"""Help answers at once, shows examples, and docs/cli.md says the same."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from gossamer.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("make_cli_page", ROOT / "docs" / "make_cli_page.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)
FOUND = maker.commands(typer.main.get_command(app))
COMMANDS = sorted(FOUND)
GROUPS = ["adapter", "bench"]
PACKAGES = ("gossamer", "cli", "compress", "pruning", "activation_sparsity", "attention", "finetune", "kernels")
HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "yaml", "matplotlib")


def test_all_commands_are_there():
    assert COMMANDS == [
        "adapter compose",
        "adapter diff",
        "adapter info",
        "adapter merge",
        "bench kernels",
        "bench model",
        "compress",
        "convert",
        "demo",
        "env",
        "eval",
        "finetune",
        "generate",
        "inspect",
        "methods",
        "plan-heads",
        "soup",
        "windows",
    ]


def test_cli_page_is_fresh():
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == maker.page(), "run `make docs`"


@pytest.mark.parametrize("command", [*GROUPS, *COMMANDS])
def test_every_help_page_has_examples(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    after = result.output.partition("Examples")[2]
    assert f"$ gossamer {command}" in after


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command):
    for param in FOUND[command].params:
        assert param.help or param.name == "help", param.name


def heavy_after(arguments: list[str]) -> list[str]:
    """Which heavy modules a run of the command has imported, in a process of its own."""
    code = (
        "import sys\n"
        f"sys.argv = ['gossamer', *{arguments!r}]\n"
        "from gossamer.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"sys.stderr.write(','.join(name for name in {HEAVY!r} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [name for name in done.stderr.split(",") if name]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["methods"], *([*name.split(), "--help"] for name in [*GROUPS, *COMMANDS])]
)
def test_nothing_heavy_is_imported_for_help(arguments):
    assert heavy_after(arguments) == []


def test_every_environment_variable_is_documented():
    reading = re.compile(r"""environ(?:\.get\(|\.setdefault\(|\[)\s*["']([A-Z_]+)["']""")
    sources = [
        path for folder in PACKAGES for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    read = set(reading.findall(text)) | set(re.findall(r"""["'](GOSSAMER_[A-Z_]+)["']""", text))
    documented = set(
        re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "env.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert len(read) >= 3
    assert read - {"GOSSAMER_"} == documented


def test_help_takes_less_than_half_a_second():
    """The best of several tries, in processor time: a busy machine is not a slow program."""
    command = [sys.executable, "-m", "gossamer", "--help"]
    best = min(_processor_seconds(command) for _ in range(3))
    assert best < 0.5


def _processor_seconds(command: list[str]) -> float:
    if not hasattr(os, "wait4"):
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - started
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime
