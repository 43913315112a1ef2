"""methods, env, demo, and what the progress prints."""

from __future__ import annotations

import io
import json
import types

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gossamer import __version__
from gossamer.cli.console import ConsoleProgress, duration
from gossamer.cli.main import app
from gossamer.compress import demo as demo_module
from gossamer.compress.progress import BlockDone
from gossamer.pruning.registry import DEFAULT_METHOD, METHODS


def run(*words: str):
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result


def test_version():
    assert run("--version").stdout == f"gossamer {__version__}\n"


def test_no_command_shows_the_help():
    result = CliRunner().invoke(app, [])
    assert "compress" in result.output
    assert "Usage" in result.output


def test_methods_lists_the_registry():
    listed = json.loads(run("methods", "--json").stdout)
    assert {row["name"] for row in listed} >= set(METHODS)
    assert [row["name"] for row in listed if row["default"]] == [DEFAULT_METHOD]
    assert all(row["summary"] for row in listed)
    table = run("methods").stdout
    assert all(name in table for name in METHODS)
    assert [row["name"] for row in listed if row["trains"]] == ["imp", "soup", "gradual", "random", "nm-flow"]


def test_env_names_versions_and_machine():
    found = json.loads(run("env", "--json").stdout)
    assert found["packages"]["gossamer"] == __version__
    assert found["packages"]["torch"] not in ("", "absent")
    assert found["cores"] >= 1
    text = run("env").stdout
    assert "processor: " in text
    assert "memory: " in text


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    asked = {}

    def make_demo(folder, **options):
        asked.update(options, folder=folder)
        options["progress"](1, 3, 4.5)
        return demo_module.DemoResult(folder, 1234567, 3, 2.0, 4.5, 56.789)

    monkeypatch.setattr(demo_module, "make_demo", make_demo)
    result = run("demo", str(tmp_path / "m"), "--steps", "3", "--seed", "9")
    assert (asked["folder"], asked["steps"], asked["seed"]) == (tmp_path / "m", 3, 9)
    assert "1,234,567 parameters" in result.stdout
    assert "perplexity 56.79" in result.stdout
    document = json.loads(run("demo", str(tmp_path / "m"), "--json").stdout)
    assert document["folder"] == str(tmp_path / "m")
    assert document["perplexity"] == 56.789


def test_default_steps_on_the_help_page():
    assert f"[default: {demo_module.SIZES['standard'].steps}]" in run("demo", "--help").stdout


def test_demo_refuses_a_taken_folder(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not empty" in result.stderr


def test_eval_passes_its_options_on(monkeypatch):
    asked = {}
    result = {"perplexity": 5.4321, "cross_entropy": 1.7, "standard_error": float("nan"), "peak_memory_bytes": 10**9}
    protocol = {
        "dataset": "t.txt", "text": "the file as it is",
        "windows": 3, "seqlen": 64, "stride": 64, "bos": "none", "predicted_tokens": 189,
        "dtype": "float32", "method": "m",
    }  # fmt: skip

    def evaluate_model(model, stage, machine, **options):
        asked.update(options, model=model, stage=stage, machine=machine)
        return {**result, "protocol": protocol}

    fake = types.ModuleType("gossamer.compress.score")
    fake.evaluate_model = evaluate_model
    monkeypatch.setitem(__import__("sys").modules, "gossamer.compress.score", fake)
    shown = run("eval", "M", "--data", "t.txt", "--seqlen", "64", "--windows", "3", "--max_memory", "1GiB").stdout
    assert (asked["model"], asked["stage"].data, asked["stage"].seqlen, asked["stage"].windows) == ("M", "t.txt", 64, 3)
    assert asked["machine"].max_memory_bytes == 2**30
    assert "perplexity 5.4321" in shown
    assert "t.txt (the file as it is), 3 windows of 64 tokens, stride 64, BOS none" in shown
    document = json.loads(run("eval", "M", "--data", "t.txt", "--json").stdout)
    assert document["standard_error"] is None


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (BlockDone("prune", 1, 4, "layers.1", 0.01234, 0.5, 3.21, 75), "prune 2/4 layers.1  error 1.234e-02  "
         "sparsity 50.00 %  3.2 s  1 m 15 s left"),
        (BlockDone("evaluate", 3, 4, "layers.3", None, None, 0.5, 0), "evaluate 4/4 layers.3  0.5 s"),
    ],
)  # fmt: skip
def test_one_line_per_block(event, line):
    stream = io.StringIO()
    with ConsoleProgress(Console(file=stream, width=40, soft_wrap=True)) as progress:
        progress.stage("prune", 4)
        progress.working("solving [q_proj]")
        progress.block(event)
        progress.note("experts [3] saw no token")
    assert stream.getvalue().splitlines() == ["prune: 4 blocks", line, "note: experts [3] saw no token"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (75, "1 m 15 s"), (3700, "1 h 01 m"), (float("inf"), "?")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_windows_are_counted_now_and_then(monkeypatch):
    """A line every ten seconds, and the last one always; a block's line counts too."""
    from gossamer.cli import console

    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with ConsoleProgress(Console(file=stream, width=80, soft_wrap=True)) as progress:
        for done, at in enumerate((4, 9, 11, 14, 22), 1):
            now[0] = float(at)
            progress.windows("evaluate output", done, 5, 7.0 - done)
    assert stream.getvalue().splitlines() == [
        "evaluate output 3/5 windows  4 s left", "evaluate output 5/5 windows",
    ]  # fmt: skip
