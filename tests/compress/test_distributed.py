"""Several gloo processes give the files of one process bit for bit, fail together, and leave nobody behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from families import VOCAB, save_family
from processes import Done, Launcher, Running, free_port
from safetensors.torch import load_file, save_file
from tiny import digests, report, save_llama, save_texts, save_words

from gossamer.compress import distributed
from gossamer.compress.sums import OuterSum

KILLED = -signal.SIGKILL
SIZES = ("--nsamples", "5", "--seqlen", "32", "--eval-windows", "3", "--format", "both")
SLABS = "import gossamer.compress.sums as sums; sums.SLAB = 16"  # several slabs in matrices this small
SPILL = ("--max-memory", "1")


class Group:
    """`gossamer` commands on one model, in as many processes as wanted."""

    def __init__(self, launcher: Launcher, model: Path) -> None:
        self.launcher, self.model = launcher, model

    def words(self, out: Path, *more: str | Path) -> list[str | Path]:
        texts = ["--calibration", self.model / "calibration.txt", "--eval", self.model / "heldout.txt"]
        return ["compress", self.model, "-o", out, *texts, *SIZES, *more]

    def begin(
        self,
        count: int,
        words: list[str | Path],
        before: dict[int, str] | None = None,
        fail: dict[int, str] | None = None,
    ) -> list[Running]:
        """`before`: rank -> Python to run first; `fail`: rank -> failpoint."""
        code = {rank: f"{SLABS}\n{(before or {}).get(rank, '')}" for rank in range(count)}
        points = {rank: {"GOSSAMER_FAILPOINT": point} for rank, point in (fail or {}).items()}
        return self.launcher.start_group(count, *words, before=code, of_rank=points)

    def run(self, count: int, out: Path, *more: str | Path, **options) -> list[Done]:
        return [process.wait() for process in self.begin(count, self.words(out, *more), **options)]

    def finished(self, count: int, out: Path, *more: str | Path, **options) -> dict[str, str]:
        """Digests of OUT after a run that must succeed."""
        for done in self.run(count, out, *more, **options):
            assert done.returncode == 0, done.stderr
        return digests(out)


@pytest.fixture
def group(launcher: Launcher, tiny: Path) -> Group:
    return Group(launcher, tiny)


@pytest.fixture(scope="module")
def whole(launcher: Launcher, tiny: Path, tmp_path_factory) -> dict[str, str]:
    """Digests of one process' undisturbed run of the default method."""
    return Group(launcher, tiny).finished(1, tmp_path_factory.mktemp("whole") / "one")


def one_error(all_done: list[Done]) -> str:
    """The only error line of all processes; all ended with 2 and without a traceback."""
    assert [done.returncode for done in all_done] == [2] * len(all_done), [done.stderr for done in all_done]
    assert not any("Traceback" in done.stderr for done in all_done)
    (error,) = [line for done in all_done for line in done.errors()]
    return error


# ---- equal results ---------------------------------------------------------------------------------------------------

SAME = {
    "default": [],
    "wanda": ["--method", "wanda", "--pattern", "2:4"],
    "sparsegpt": ["--method", "sparsegpt", "--include", "lm_head", "--include", "mlp"],
    "owl": ["--method", "sparsegpt", "--allocation", "owl", *SPILL],
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_two_processes_write_the_files_of_one(group, tmp_path, options):
    """5 calibration and 3 evaluation windows: no process has as many as the other."""
    one = group.finished(1, tmp_path / "one", *options)
    both = group.run(2, tmp_path / "two", *options)
    assert [done.returncode for done in both] == [0, 0], both
    assert digests(tmp_path / "two") == one
    assert both[0].stdout
    assert "prune 3/3" in both[0].stderr
    assert (both[1].stdout, both[1].stderr) == ("", "")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    plain, found = report(tmp_path / "one"), report(tmp_path / "two")
    for document in (plain, found):
        for row in [*document["layers"], *document["evaluations"]]:
            row.pop("seconds")
    volatile = {"command", "time_s", "peak_memory_bytes", "stages", "output"}
    assert {k: v for k, v in found.items() if k not in volatile} == {
        k: v for k, v in plain.items() if k not in volatile
    }


def test_more_processes_than_windows(group, tmp_path):
    few = ("--nsamples", "2", "--eval-windows", "1")
    assert group.finished(3, tmp_path / "three", *few) == group.finished(1, tmp_path / "one", *few)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_only_one_process_saw(launcher, tmp_path, name):
    """With few tokens per window some experts get none in one process, or in all."""
    model = save_family(name, tmp_path / "model")
    save_words(model, VOCAB)
    draw = random.Random(0)
    for file, count in (("calibration.txt", 300), ("heldout.txt", 200)):
        (model / file).write_text(" ".join(f"w{draw.randrange(3, VOCAB)}" for _ in range(count)))
    few = ("--seqlen", "6", "--eval-seqlen", "16", "--method", "wanda")
    experts = Group(launcher, model)
    one = experts.finished(1, tmp_path / "one", *few)
    assert experts.finished(2, tmp_path / "two", *few) == one
    tokens = {row["name"]: row["tokens"] for row in report(tmp_path / "two")["layers"] if ".experts." in row["name"]}
    assert len(set(tokens.values())) > 2
    assert report(tmp_path / "two")["notes"] == report(tmp_path / "one")["notes"]


def test_a_recipe_of_two_stages(group, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    common = f"calibration: {tiny}/calibration.txt, nsamples: 3, seqlen: 32"
    recipe.write_text(
        f"stages:\n- {{stage: prune, method: wanda, sparsity: 0.3, {common}}}\n"
        f"- {{stage: prune, method: gossamer, sparsity: 0.6, {common}}}\n- {{stage: export}}\n"
    )
    found = []
    for count in (1, 2):
        out = tmp_path / str(count)
        for process in group.begin(count, ["compress", tiny, "-o", out, "--recipe", recipe]):
            done = process.wait()
            assert done.returncode == 0, done.stderr
        found.append(digests(out))
    assert found[0] == found[1]


def test_evaluation_is_shared_too(group, tiny):
    words = ["eval", tiny, "--data", tiny / "heldout.txt", "--seqlen", "16", "--windows", "5", "--json"]
    (one,) = [process.wait().json() for process in group.begin(1, words)]
    two = [process.wait() for process in group.begin(2, words)]
    assert two[1].stdout == two[1].stderr == ""
    for key in ("perplexity", "cross_entropy", "standard_error", "protocol"):
        assert two[0].json()[key] == one[key]


# ---- failing together ------------------------------------------------------------------------------------------------


def test_a_mistake_in_the_command_is_told_once(group, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    error = one_error(group.run(2, tmp_path / "out"))
    assert error == f"error: {tmp_path / 'out'} exists and is not empty"
    assert not (tmp_path / "out.partial").exists()


def test_options_that_contradict_each_other_are_told_once(group, tmp_path):
    assert "--no-eval contradicts" in one_error(group.run(2, tmp_path / "out", "--no-eval"))


def test_reconstruct_needs_one_process(group, tmp_path):
    error = one_error(group.run(2, tmp_path / "out", "--reconstruct"))
    assert "reconstruct trains on all windows in one process, and 2 were started" in error


def test_damaged_weights_are_told_once(launcher, tmp_path):
    model = save_llama(tmp_path / "model")
    save_texts(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    error = one_error(Group(launcher, model).run(2, tmp_path / "out"))
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in error


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


# ---- the launchers people use ----------------------------------------------------------------------------------------


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


# ---- who does what ---------------------------------------------------------------------------------------------------


@pytest.fixture
def as_rank(monkeypatch):
    """Pretend to be one of several processes."""

    def pretend(rank: int, world: int) -> None:
        monkeypatch.setattr(distributed, "world", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda: rank)

    return pretend


def test_wrapped_models_end_before_their_group(monkeypatch):
    """The other way round, a process waits for its own network threads for ever."""

    class Wrapped:
        def __init__(self) -> None:
            self.trainer = self  # only a cycle holds it

    gone = weakref.ref(Wrapped())
    assert gone() is not None
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: alive.append(gone()))
    alive: list[object] = []
    distributed.leave()
    assert alive == [None]


@pytest.mark.parametrize(("count", "world"), [(5, 1), (5, 2), (7, 3), (2, 4), (6, 3)])
def test_every_window_has_one_owner_and_one_turn(as_rank, count, world):
    shares, turns = [], []
    for rank in range(world):
        as_rank(rank, world)
        shares.append(list(distributed.my_share(count)))
        turns.append(list(distributed.turns(count)))
        assert distributed.followed(count) == sorted({0, *shares[-1]})
        assert [window for window in turns[-1] if window is not None] == shares[-1]
    assert sorted(window for share in shares for window in share) == list(range(count))
    assert len({len(turn) for turn in turns}) == 1
    in_order = [turn[k] for k in range(len(turns[0])) for turn in turns]
    assert [window for window in in_order if window is not None] == list(range(count))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_a_sum_are_exactly_the_sum(as_rank, monkeypatch, symmetric, world):
    """Every rank adds up its own slabs; one rank's entries and the others' zeros are the whole."""
    monkeypatch.setattr("gossamer.compress.sums.SLAB", 8)
    monkeypatch.setattr(distributed, "sum_", lambda tensor: tensor)
    windows = [(torch.randn(13, 37), torch.randn(13, 37 if symmetric else 21)) for _ in range(4)]

    def total() -> torch.Tensor:
        summed = OuterSum(37, 37 if symmetric else 21, torch.device("cpu"), symmetric=symmetric)
        for a, b in windows:
            summed.add(a, a if symmetric else b)
        return summed.take()

    as_rank(0, 1)
    whole = total()
    parts = []
    for rank in range(world):
        as_rank(rank, world)
        parts.append(total())
    assert torch.equal(sum(parts), whole)
    assert all(bool((part != 0).any()) for part in parts)
    assert sum((part != 0).int() for part in parts).max() == 1


def test_slabs_of_growing_length_are_dealt_fairly(as_rank):
    as_rank(0, 2)
    load = [0, 0]
    for slab in range(8):
        load[distributed.owner_of(slab)] += slab + 1
    assert load == [18, 18]
