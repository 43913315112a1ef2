"""gossamer soup: what it passes on, and numbers that cannot be."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from gossamer.cli.main import app
from gossamer.compress import averaging


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--windows", "-1"], "windows must be at least 1, got -1"),
        (["--windows", "0"], "windows must be at least 1, got 0"),
        (["--margin", "nan"], "margin must be at least 0 and finite, got nan"),
        (["--margin", "-1"], "margin must be at least 0 and finite, got -1"),
        (["--weights", "1e308,1e308"], "their sum must be above 0 and finite, got 1e+308, 1e+308"),
        (["--weights", "a,b"], "--weights 'a,b' is not understood"),
    ],
)
def test_numbers_that_cannot_be(tmp_path, words, said):
    result = CliRunner().invoke(app, ["soup", "A", "B", "-o", str(tmp_path / "out"), "--data", "held.txt", *words])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "windows"), [([], 128), (["--windows", "3"], 3)])
def test_windows_are_passed_on(monkeypatch, tmp_path, words, windows):
    asked = {}

    def average(models, out, **options):
        asked.update(options, models=models)
        return {"weights": [0.5, 0.5], "models": models}

    monkeypatch.setattr(averaging, "average_checkpoints", average)
    result = CliRunner().invoke(app, ["soup", "A", "B", "-o", str(tmp_path / "out"), "--data", "held.txt", *words])
    assert result.exit_code == 0, result.output
    assert (asked["models"], asked["windows"]) == (["A", "B"], windows)


@pytest.mark.parametrize("words", [["--windows", "3"], ["--margin", "2"], ["--seqlen", "64"]])
def test_options_of_a_comparison_need_a_text(tmp_path, words):
    result = CliRunner().invoke(app, ["soup", "A", "B", "-o", str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    assert f"{words[0]} without --data: nothing is compared" in " ".join(result.stderr.split())
