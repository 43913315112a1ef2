"""Several processes by torchrun and accelerate: the files of one process, one message, no orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from groups import Group
from processes import free_port
from tiny import digests


def launched(how: list[str], words: list[str | Path]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *how, *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def torchrun() -> list[str]:
    return ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "gossamer"]


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(") ")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_torchrun(group, tmp_path):
    """Through the real interpreter exit, too: a process that leaves its group in disorder is aborted."""
    words = ["compress", group.model, "-o", tmp_path / "two", "--calibration", group.model / "calibration.txt"]
    words += ["--no-eval", "--method", "wanda", "--nsamples", "3", "--seqlen", "32"]
    one = group.launcher.run(*words[:3], tmp_path / "one", *words[4:])
    assert one.returncode == 0, one.stderr
    process = launched(torchrun(), words)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stdout.count("before") == 1
    assert stderr.count("prune 3/3") == 1
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_reports_a_mistake_once(group, tmp_path):
    process = launched(torchrun(), group.words(tmp_path / "out", "--sparsity", "1.5"))
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert sum(line.startswith("error: ") for line in stderr.splitlines()) == 1
    assert "exitcode  : 2" in stderr
    assert members(process.pid) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="lists processes through /proc")
def test_interrupted_torchrun_leaves_no_orphan(group, tmp_path):
    process = launched(torchrun(), group.words(tmp_path / "out", "--nsamples", "2000"))
    while not (tmp_path / "out.partial" / "journal.jsonl").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert stderr.count("error: interrupted") == 1, stderr
    assert members(process.pid) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_accelerate_launch(group, tmp_path):
    how = [
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    how += ["--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m", "gossamer"]
    process = launched(how, group.words(tmp_path / "two"))
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    plain = Group(group.launcher, group.model)
    done = plain.launcher.run(*plain.words(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
