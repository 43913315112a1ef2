"""gossamer bench kernels: its report, its files, its refusals. No figure is looked at."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from gossamer.cli import bench as command
from gossamer.cli.main import app
from gossamer.compress import bench as driver
from gossamer.errors import RecipeError
from gossamer.kernels import extension, tier
from gossamer.kernels.bench import cases_token, measure, rounds, table
from gossamer.kernels.bench.case import Case
from gossamer.kernels.bench.cases import cases
from gossamer.kernels.bench.cases_token import token_cases
from gossamer.kernels.bench.shapes import SETS, parse

needs_module = pytest.mark.skipif(extension.compiled() is None, reason="no compiled kernels to measure")
NAMES = [
    "torch bfloat16", "torch bfloat16, no oneDNN", "torch float16", "dense bfloat16",
    "bitmask 50%", "bitmask 70%", "bitmask 80%", "bitmask 2:4", "int8 bitmask 50%",
    "activation-sparse 50%", "activation-sparse 65%", "activation-sparse 80%", "dual 50% x 50%",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setattr(rounds, "unrelated_bytes", lambda: 1 << 16)
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(cases_token, "LENGTHS", (5, 70))


def run(*words: str):
    return CliRunner().invoke(app, ["bench", "kernels", "--threads", "1", "--rounds", "2", *words])


@needs_module
def test_tables_json_and_markdown(tmp_path):
    before = torch.get_num_threads(), tier.current()
    files = ["--json", str(tmp_path / "k.json"), "--markdown", str(tmp_path / "k.md")]
    result = run("--shapes", "20x64,1x63,80x20", *files)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "k.json").read_text())
    assert [(shape["rows"], shape["cols"]) for shape in report["shapes"]] == [(20, 64), (1, 63), (80, 20)]
    assert report["machine"].items() >= {
        "threads": 1, "rounds": 2, "dtype": "bfloat16", "tier": tier.current().name, "torch": torch.__version__,
    }.items()  # fmt: skip
    first, second, third = report["shapes"]
    assert [case["name"] for case in first["cases"]] == NAMES
    assert [case["name"] for case in second["cases"]] == [name for name in NAMES if "2:4" not in name]
    assert [case["name"] for case in third["cases"]] == [*NAMES, "MLP, 40% of neurons"]
    for case in first["cases"] + second["cases"] + third["cases"]:
        assert not case["error"]
        assert case["us"]["best"] <= case["us"]["decile"] <= case["us"]["median"]
    assert [entry["title"] for entry in report["token"]][:2] == [
        "norm of 4096", "one query of 32 heads, 5 keys of 8 heads of 128"
    ]  # fmt: skip
    for entry in report["token"]:
        assert not any(case["error"] for case in entry["cases"]), entry
        assert sum(case["dense"] for case in entry["cases"]) == len(entry["cases"]) - 1 == 2
    lines = (tmp_path / "k.md").read_text().splitlines()
    assert (lines[0], lines[-1]) == (table.BEGIN, table.END)
    assert result.stdout.splitlines() == lines[1:-1]
    assert sum(line.startswith("| bitmask 50% |") for line in lines) == 3
    assert "20 x 64 2/2 rounds" in result.stderr
    assert (torch.get_num_threads(), tier.current()) == before


@needs_module
def test_tier_and_dtype(tmp_path):
    result = run("--shapes", "8x64", "--tier", "scalar", "--dtype", "float16", "--json", str(tmp_path / "k"), "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads((tmp_path / "k").read_text())
    assert (report["machine"]["tier"], report["machine"]["dtype"]) == ("scalar", "float16")
    assert "dense float16" in [case["name"] for case in report["shapes"][0]["cases"]]


@needs_module
def test_a_wrong_result_has_no_speed(tmp_path, monkeypatch):
    def spoilt(rows, cols, dtype):
        found = cases(rows, cols, dtype)
        for case in found:
            if case.name == "bitmask 70%":
                case.call = lambda right=case.call: right() + (1.0 if rows == 20 else 0.0)
        return found

    monkeypatch.setattr(measure, "cases", spoilt)
    result = run("--shapes", "20x64", "--json", str(tmp_path / "k.json"))
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("| bitmask 70% |")]
    assert "wrong result: " in line
    assert line.endswith("times the allowed error | | | | |")
    assert "error: bitmask 70% on 20 x 64: " in result.stderr
    entries = {case["name"]: case for case in json.loads((tmp_path / "k.json").read_text())["shapes"][0]["cases"]}
    assert "us" not in entries["bitmask 70%"]
    assert "speedup" not in entries["bitmask 70%"]
    assert entries["bitmask 80%"]["speedup"] > 0


@pytest.mark.parametrize(
    "spoil", [lambda y: y * float("nan"), lambda y: y + 0.5, lambda y: y[:, :-1], torch.zeros_like]
)
def test_faults_are_found(spoil):
    found = [*cases(20, 64, torch.bfloat16), *cases(80, 20, torch.bfloat16), *cases(80, 20, torch.float16)]
    found += [case for dtype in (torch.bfloat16, torch.float16) for few in token_cases(dtype).values() for case in few]
    assert sum(case.products == 3 for case in found) == 2
    for case in found:
        assert case.fault() == "", case.name
        case.call = lambda right=case.call: spoil(right())
        assert case.fault(), case.name


def test_a_weight_of_zeros_allows_no_error():
    x, weight = torch.ones(1, 4), torch.zeros(3, 4)
    assert Case("zeros", lambda: torch.zeros(1, 3), 0, x, weight).fault() == ""
    assert Case("not zeros", lambda: torch.full((1, 3), 1e-30), 0, x, weight).fault() == "inf times the allowed error"


@needs_module
@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["--shapes", "4096"], "shape '4096' is unknown", "write for example"),
        (["--shapes", "0x64"], "shape '0x64' is unknown", "write for example"),
        (["--shapes", "llama-9"], "shape 'llama-9' is unknown; allowed: OUTxIN", "llama-3-8b"),
        (["--shapes", ""], "shape '' is unknown", "write for example"),
        (["--threads", "0"], "--threads 0 is out of range", "1 to that many"),
        (["--threads", "5000"], "--threads 5000 is out of range", "1 to that many"),
        (["--rounds", "0"], "--rounds 0 is too few", "20 or more"),
        (["--tier", "sse9"], "--tier 'sse9' is not among those of this processor", "leave --tier out"),
        (["--dtype", "int4"], "--dtype 'int4' is unknown; allowed: bfloat16, float16", None),
        (["--json", "missing/k.json"], "missing/k.json cannot be written", "create the folder"),
        (["--shapes", "9999999x9999999"], "needs about", "fewer rows"),
    ],
)
def test_mistakes(words, error, hint):
    result = run("--shapes", "8x64", *words)
    assert result.exit_code == 2
    assert f"error: {error}" in result.stderr or error in result.stderr
    assert hint is None or hint in result.stderr
    assert result.stdout == ""


def test_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(tier, "available", dict)
    result = run("--shapes", "8x64")
    assert result.exit_code == 2
    assert "error: there are no compiled kernels to measure\nhint: reinstall" in result.stderr


def test_pages(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n")
    for _ in range(2):
        table.check_page(page)
        table.write_page(page, "new\n")
        assert page.read_text() == f"before\n\n{table.BEGIN}\nnew\n{table.END}\n\nafter\n"
    for text in ("no marks", f"{table.END}\n{table.BEGIN}\n"):
        page.write_text(text)
        with pytest.raises(RecipeError, match="has no lines"):
            table.check_page(page)


def test_dense_products_are_compared_with_the_others():
    found = [
        Case("mine", lambda: torch.zeros(1), 1000, torch.zeros(1), torch.zeros(1), dense=True, must=1.0),
        Case("theirs", lambda: torch.zeros(1), 1000, torch.zeros(1), torch.zeros(1), dense=True),
        Case("sparse", lambda: torch.zeros(1), 500, torch.zeros(1), torch.zeros(1), must=3.0),
        Case("three", lambda: torch.zeros(1), 1000, torch.zeros(1), torch.zeros(1), must=2.4, products=3),
    ]
    times = {"mine": 10.0, "theirs": 20.0, "sparse": 4.0, "three": 10.0}
    timings = {name: rounds.Timing(time, time, time) for name, time in times.items()}
    dense = {"mine": 10.0, "theirs": 20.0}
    entries = [measure._entry(case, timings[case.name], "", dense, 0.2) for case in found]
    assert [entry["speedup"] for entry in entries] == [2.0, 0.5, 2.5, 3.0]
    assert [entry["share_of_read"] for entry in entries] == [0.5, 0.25, 0.625, 0.5]
    assert [table._verdict(entry) for entry in entries] == ["1.0 met", "", "3.0 MISSED", "2.4 met"]


def test_shapes():
    assert parse("llama-3-8b") == [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
    assert parse("1x2, LLAMA-2-7B,1x2") == [(1, 2), (4096, 4096), (11008, 4096), (4096, 11008)]
    assert SETS["gemma-2-2b"] == ((2048, 2304), (1024, 2304), (2304, 2048), (9216, 2304), (2304, 9216))
    assert parse(command.SHAPES)
    help_text = " ".join(CliRunner().invoke(app, ["bench", "kernels", "--help"]).output.replace("│", " ").split())
    assert all(name in help_text for name in SETS)


def test_progress_counts_rounds(monkeypatch):
    """What the driver tells while it measures."""
    events = []

    class Watcher(driver.Progress):
        def windows(self, label, done, total, seconds_left, unit="windows"):
            events.append((label, done, total, unit))

    def measure_shape(rows, cols, dtype, count, each):
        return {"told": [each(done + 1) for done in range(count)]}

    monkeypatch.setattr(driver, "measure_shape", measure_shape)
    driver._measured((8, 64), torch.bfloat16, 2, Watcher())
    assert events == [("8 x 64", 1, 2, "rounds"), ("8 x 64", 2, 2, "rounds")]
