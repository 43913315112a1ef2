"""The commands on the demo model, in processes of their own, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WINDOWS = ["--seqlen", "128", "--eval-windows", "6", "--nsamples", "8"]


def gossamer(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gossamer", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def texts(demo: Path) -> list[str | Path]:
    return ["--calibration", demo / "calibration.txt", "--eval", demo / "heldout.txt"]


@pytest.fixture(scope="module")
def sparse(demo, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The demo model at 50 %, by wanda, and what the command said; through the interpreter's own start and end."""
    folder = tmp_path_factory.mktemp("sparse")
    done = gossamer("compress", demo, "-o", "out", "--method", "wanda", *texts(demo), *WINDOWS, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", done


def test_compress_prints_the_table_and_the_progress(sparse):
    out, done = sparse
    report = json.loads((out / "report.json").read_text())
    assert (out / "gossamer" / "layers.png").stat().st_size > 10_000  # drawn
    before, after = (report["evaluation"][key]["perplexity"] for key in ("before", "after"))
    assert f"{before:.4f}" in done.stdout
    assert f"{after:.4f}" in done.stdout
    assert before < after
    assert report["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-3)
    said = " ".join(done.stdout.split())
    assert "perplexity: heldout.txt (the file as it is), 6 windows of 128 tokens, stride 128, BOS " in said
    assert "calibration: calibration.txt (the file as it is), 8 windows of 128 tokens, seed 0" in said
    assert report["evaluation"]["protocol"]["text"] == report["calibration"]["text"] == "the file as it is"
    assert "evaluate output 6/6 windows" in done.stderr.splitlines()
    assert sum(line.startswith("prune") and "error" in line for line in done.stderr.splitlines()) >= 2
    assert "Traceback" not in done.stderr


def test_json_is_one_document_and_quiet_is_quiet(launcher, demo, tmp_path):
    words = ["--method", "magnitude", "--no-eval", "--json", "-q"]
    done = launcher.run("compress", demo, "-o", tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluation"] is None
    assert done.stderr == ""


def test_eval_of_the_result_equals_the_report(launcher, sparse, demo):
    out, _ = sparse
    done = launcher.run("eval", out, "--data", demo / "heldout.txt", "--seqlen", "128", "--windows", "6", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(report["evaluation"]["after"]["perplexity"], rel=1e-6)


def test_inspect_counts_the_zeros(launcher, sparse):
    out, _ = sparse
    found = json.loads(launcher.run("inspect", out, "--json").stdout)
    assert found["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-3)
    assert found["bytes"]["stored"] < found["bytes"]["dense"]
    assert launcher.run("inspect", out).stdout.count("explicit") == found["masks"]


def test_convert_there_and_back(launcher, sparse, tmp_path):
    import torch
    from safetensors.torch import load_file

    out, _ = sparse
    assert launcher.run("convert", out, tmp_path / "dense", "--to", "dense").returncode == 0
    assert launcher.run("convert", tmp_path / "dense", tmp_path / "again", "--to", "sparse").returncode == 0
    first, again = (load_file(folder / "model.sparse.safetensors") for folder in (out, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_dry_run_writes_nothing(launcher, demo, tmp_path):
    words = ["compress", demo, "-o", "out", "--pattern", "2:4", *texts(demo), *WINDOWS, "--dry-run"]
    done = launcher.run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "self_attn.q_proj" in done.stdout
    assert "(50.00 %)" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval", "missing.txt"], "missing.txt does not exist"),
        (["--eval", "someone/dataset"], "someone/dataset"),
        (["--method", "wandaa", "--no-eval"], "method 'wandaa' is unknown"),
        (["--pattern", "3:7", "--no-eval"], "3:7"),
        (["--pattern", "4:2", "--no-eval"], "4:2"),
        (["--exclude", "no_such_layer", "--no-eval"], "matches no matrix"),
        (["--seqlen", "4096", "--no-eval"], "4096"),
        (["--device", "warp", "--no-eval"], "warp"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(launcher, demo, tmp_path, words, message):
    done = launcher.run("compress", demo, "-o", "out", "--calibration", demo / "calibration.txt", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_same_text_twice_is_refused_and_can_be_allowed(launcher, demo, tmp_path):
    text = demo / "heldout.txt"
    words = [
        "compress",
        demo,
        "-o",
        tmp_path / "out",
        "--method",
        "wanda",
        "--calibration",
        text,
        "--eval",
        text,
        *WINDOWS,
    ]
    done = launcher.run(*words)
    assert done.returncode == 2
    assert "--allow-overlap" in done.stderr
    done = launcher.run(*words, "--allow-overlap", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["overlap"] == {"share": 1.0, "allowed": True}
    assert any("overlap" in note for note in report["notes"])


def test_magnitude_needs_no_tokenizer(launcher, demo, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(demo, model, ignore=shutil.ignore_patterns("tokenizer*"))
    assert launcher.run("compress", model, "-o", tmp_path / "a", "--method", "magnitude", "--no-eval").returncode == 0
    done = launcher.run("compress", model, "-o", tmp_path / "b", "--method", "wanda", *texts(demo), *WINDOWS)
    assert done.returncode == 2
    assert "no usable tokenizer" in done.stderr


def test_taken_folder(launcher, sparse, demo):
    out, _ = sparse
    done = launcher.run("compress", demo, "-o", out, "--method", "magnitude", "--no-eval")
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
