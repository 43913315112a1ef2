"""One process that fails, is killed or interrupted ends all of its group, and --resume goes on."""

from __future__ import annotations

import os
import signal
import time

import pytest
from groups import one_error
from tiny import digests

KILLED = -signal.SIGKILL
FAILING = """
import gossamer.compress.{module} as module
from gossamer.errors import ResourceError
from errno import ENOSPC
calls = 0
original = module.{name}
def failing(*arguments, **named):
    global calls
    calls += 1
    if calls == {call}:
        raise {error}
    return original(*arguments, **named)
module.{name} = failing
"""
FULL = "OSError(ENOSPC, 'No space left on device', '/disk')"
PLACES = {
    "embedding": (1, "hidden", "HiddenStore.put", 1, FULL),
    "a block": (1, "hidden", "HiddenStore.put", 9, FULL),
    "a solver": (1, "stages.matrix", "solve", 2, "ResourceError('no memory left')"),
    "a part": (0, "stages.prune", "write_exported", 2, FULL),
    "the journal": (0, "journal", "Journal.finish", 3, FULL),
    "the checkpoint": (0, "export", "assemble", 1, FULL),
    "the rename": (0, "run", "sync_tree", 1, FULL),
}


RARE = ("embedding", "the journal", "the checkpoint")


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[pytest.mark.slow] if place in RARE else []) for place in PLACES]
)
def test_one_failing_process_ends_all(group, whole, tmp_path, place):
    """Whoever fails, and wherever: one message, code 2 from everybody, and --resume goes on."""
    rank, module, name, call, error = PLACES[place]
    code = FAILING.format(module=module, name=name, call=call, error=error)
    told = one_error(group.run(2, tmp_path / "out", before={rank: code}))
    assert told == ("error: no memory left" if "memory" in error else "error: /disk: No space left on device")
    assert not (tmp_path / "out").exists()
    assert group.finished(2, tmp_path / "out", "--resume") == whole


def test_a_failure_nobody_expects_is_told_by_the_process_that_has_it(group, tmp_path):
    code = FAILING.format(module="stages.prune", name="PruneRun._groups", call=2, error="ResourceError('only here')")
    first, second = group.run(2, tmp_path / "out", before={1: code})
    assert (first.returncode, second.returncode) == (2, 2)
    assert second.errors() == ["error: only here"]
    assert first.errors() == ["error: process 0 lost the others: one of the 2 processes has ended"]
    assert "--resume" in first.stderr


@pytest.mark.parametrize(("rank", "point"), [(1, "calibration:6"), (0, "part:2")])
def test_a_killed_process_does_not_leave_the_other_waiting(group, whole, tmp_path, rank, point):
    """And the run goes on with another number of processes: it makes no difference to the result."""
    out = tmp_path / "out"
    done = group.run(2, out, fail={rank: point})
    assert done[rank].returncode == KILLED
    assert done[1 - rank].returncode == 2
    assert done[1 - rank].errors() == [f"error: process {1 - rank} lost the others: one of the 2 processes has ended"]
    assert not out.exists()
    resumed = group.run(rank + 1, out, "--resume")
    assert [done.returncode for done in resumed] == [0] * (rank + 1), resumed
    assert "prune 1/3" not in resumed[0].stderr
    assert digests(out) == whole


def test_a_run_of_one_process_is_continued_by_two(group, whole, tmp_path):
    out = tmp_path / "out"
    assert (
        group.run(1, out, before={0: "import os; os.environ['GOSSAMER_FAILPOINT'] = 'part:2'"})[0].returncode == KILLED
    )
    assert group.finished(2, out, "--resume") == whole


def test_killed_after_the_rename(group, tmp_path):
    out = tmp_path / "out"
    assert group.run(2, out, fail={0: "published"})[0].returncode == KILLED
    assert out.exists()
    assert (tmp_path / "out.partial").exists()
    done = group.run(2, out, "--resume")
    assert [d.returncode for d in done] == [0, 0]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("interrupted", [(0, 1), (0,), (1,)], ids=["both", "first", "second"])
def test_interrupt_ends_every_process(group, tmp_path, interrupted):
    running = group.begin(2, group.words(tmp_path / "out", "--method", "wanda", "--nsamples", "150"))
    while "prune 1/3" not in running[0].said():
        time.sleep(0.01)
    for rank in interrupted:
        running[rank].signal(signal.SIGINT)
    done = [process.wait() for process in running]
    assert all(d.returncode in ((130,) if rank in interrupted else (2, 130)) for rank, d in enumerate(done)), done
    assert not any("Traceback" in d.stderr for d in done)
    if 0 in interrupted:
        assert done[0].errors() == ["error: interrupted"]
    assert not (tmp_path / "out").exists()
    for process in running:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
