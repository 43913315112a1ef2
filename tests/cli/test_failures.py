"""What the user sees when something goes wrong: one line, a hint, an exit code."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gossamer import errors
from gossamer.cli.main import app


def outcome(monkeypatch, failure: BaseException, *words: str):
    """Run a command whose work ends in `failure`."""
    import types

    def fail(*arguments, **options):
        raise failure

    fake = types.ModuleType("gossamer.compress.run")
    fake.compress = fake.plan = fail
    monkeypatch.setitem(sys.modules, "gossamer.compress.run", fake)
    return CliRunner().invoke(app, ["compress", "M", "-o", "O", "--no-eval", *words])


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_expected_failures(monkeypatch, kind):
    result = outcome(monkeypatch, kind("what came\nis wrong", hint="do  this"))
    assert result.exit_code == kind.exit_code
    assert result.stderr.endswith("error: what came is wrong\nhint: do this\n")
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_no_hint_no_hint_line(monkeypatch):
    assert outcome(monkeypatch, errors.DataError("bad")).stderr.endswith("error: bad\n")


def test_interrupt_says_how_to_go_on(monkeypatch):
    result = outcome(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert "error: interrupted\nhint: repeat the command with --resume" in result.stderr


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EROFS])
def test_storage_failures(monkeypatch, code):
    result = outcome(monkeypatch, OSError(code, "went wrong", "some/file"))
    assert result.exit_code == 2
    assert "error: some/file: went wrong\nhint: " in result.stderr


@pytest.mark.parametrize(
    "failure", [ValueError("a bug"), OSError(errno.EIO, "device"), AssertionError("x"), KeyError("y")]
)
def test_anything_else_is_a_fault_of_ours(monkeypatch, failure):
    result = outcome(monkeypatch, failure)
    assert result.exit_code == 1
    assert result.exception is failure


def test_a_fault_keeps_its_traceback():
    code = (
        "import sys, gossamer.pruning.registry as registry\n"
        "def fail(): raise ValueError('a bug')\n"
        "registry.method_names = fail\n"
        "sys.argv = ['gossamer', 'methods']\n"
        "from gossamer.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: a bug" in done.stderr


def test_exit_codes_of_the_process():
    def code(*words: str) -> int:
        return subprocess.run([sys.executable, "-m", "gossamer", *words], capture_output=True).returncode

    assert code("methods") == 0
    assert code("convert", "a", "b", "--to", "nothing") == 2
    assert code("no-such-command") == 2
