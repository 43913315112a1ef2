"""The command `gossamer` in processes of its own, without paying for the imports every time.

One parent process imports everything and then forks a child for every command. A child is an ordinary process: it has
its own working folder, environment and output, and can be killed at any moment.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PARENT = """
import atexit, faulthandler, gc, json, os, sys, traceback
import torch, transformers, accelerate
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers.models.llama.modeling_llama
import gossamer.compress.run, gossamer.compress.score, gossamer.compress.convert
from gossamer.compress.stages import evaluate, finetune, prune_kind
from gossamer.cli import console
from gossamer.cli.main import command, main
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
command()
get_checkpoint_conversion_mapping("llama")  # the table of all models, a quarter of a second once
import rich.console, rich.progress, rich.status, rich.table, rich.traceback
import matplotlib.figure, matplotlib.backends.backend_agg
sys.path.insert(0, os.environ.pop("LAUNCHER_HELPERS"))
from pictures import leave_unrendered
del sys.path[0]
leave_unrendered()

def child(job):
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for number, path in ((1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if "RANK" in job["env"]:  # a rank that waits for ever says where
        faulthandler.dump_traceback_later(200, exit=True, file=2)
    sys.argv = ["gossamer", *job["words"]]
    code = 0
    try:
        exec(job["before"], {})
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

gc.collect()
gc.freeze()  # children that collect need not look at the imports
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        child(job)
    print(pid, flush=True)
"""


@dataclass(frozen=True)
class Done:
    """A finished command. `returncode` is negative when a signal ended it."""

    returncode: int
    stdout: str
    stderr: str

    def json(self) -> dict:
        assert self.returncode == 0, self.stderr
        return json.loads(self.stdout)

    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def free_port() -> int:
    """A port that nothing listens on, for the processes of one group to meet at.

    Below the ports that the kernel gives to connections (from 32768), so that none of those takes it first, and in a
    range of its own for every worker of the test run.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    while True:
        port = 16000 + 2000 * worker + next(_PORTS) % 2000
        with socket.socket() as tried:
            with suppress(OSError):
                tried.bind(("127.0.0.1", port))
                return port


_PORTS = itertools.count(os.getpid())


class Running:
    """A command under way."""

    def __init__(self, launcher: Launcher, pid: int, folder: Path) -> None:
        self._launcher, self.pid, self._folder = launcher, pid, folder

    def said(self) -> str:
        """What it wrote on stderr so far."""
        path = self._folder / "stderr"
        return path.read_text() if path.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Done:
        code = int(self._launcher.ask({"wait": self.pid}))
        self._launcher.alive.discard(self.pid)
        return Done(code, (self._folder / "stdout").read_text(), (self._folder / "stderr").read_text())


class Launcher:
    """Starts commands with one thread each; `environment` is added to that of this process.

    Their pictures are not rendered (see pictures.py).
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        helpers = {"LAUNCHER_HELPERS": str(Path(__file__).resolve().parent)}
        self._folder = tempfile.TemporaryDirectory(prefix="launcher-")
        self._count = 0
        self.alive: set[int] = set()
        self._parent = subprocess.Popen(
            [sys.executable, "-c", _PARENT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **threads, **offline, **helpers, **(environment or {})},
        )  # fmt: skip
        assert self._answer() == "ready"

    def start(
        self,
        *words: str | Path | float,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        before: str = "",
    ) -> Running:
        """`before`: Python that runs in the process first."""
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        job = {
            "words": [str(word) for word in words], "cwd": str(cwd or folder), "env": dict(env or {}), "before": before,
            "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr"),
        }  # fmt: skip
        running = Running(self, int(self.ask(job)), folder)
        self.alive.add(running.pid)
        return running

    def run(
        self,
        *words: str | Path | float,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        before: str = "",
    ) -> Done:
        return self.start(*words, cwd=cwd, env=env, before=before).wait()

    def start_group(
        self,
        count: int,
        *words: str | Path | float,
        env: Mapping[str, str] | None = None,
        before: Mapping[int, str] | str = "",
        of_rank: Mapping[int, Mapping[str, str]] | None = None,
    ) -> list[Running]:
        """The same command as all ranks of one torch.distributed group, as `torchrun` would start it.

        `before` is for every rank, or rank -> what runs first there; `of_rank` is environment of single ranks.
        A group of 1 is an ordinary process.
        """
        port = str(free_port())
        found = []
        for rank in range(count):
            own = dict(env or {}) | dict((of_rank or {}).get(rank, {}))
            if count > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                own |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            first = before if isinstance(before, str) else before.get(rank, "")
            found.append(self.start(*words, env=own, before=first))
        return found

    def ask(self, job: dict) -> str:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(job) + "\n")
        self._parent.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        assert line, "the process that starts the commands has died"
        return line.strip()

    def close(self) -> None:
        for pid in self.alive:  # of a test that failed before it had waited for them
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._parent.send_signal(signal.SIGTERM)
        self._parent.communicate()
        self._folder.cleanup()
