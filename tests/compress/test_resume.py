"""A run killed at any moment and resumed gives the files of a run that nobody disturbed."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny import digests, report, save_llama, save_texts, words

KILLED = -signal.SIGKILL
SPILL = ("--max-memory", "1")  # one byte: every hidden state lives on disk
SHORT = ("--nsamples", "5", "--seqlen", "32", "--eval-windows", "3", "--format", "both")


def texts(model: Path) -> list[str | Path]:
    return ["--calibration", model / "calibration.txt", "--eval", model / "heldout.txt"]


class Job:
    """One command line; `run(out)` runs it, `whole()` gives the digests of an undisturbed run."""

    def __init__(self, launcher, model: Path, folder: Path, *options: str) -> None:
        self.launcher, self.model, self.folder, self.options = launcher, model, folder, options

    def words(self, out: Path, *more: str | Path) -> list[str | Path]:
        return ["compress", self.model, "-o", out, *texts(self.model), *SHORT, *self.options, *more]

    def run(self, out: Path, *more: str | Path, fail: str = ""):
        return self.launcher.run(*self.words(out, *more), env={"GOSSAMER_FAILPOINT": fail})

    def whole(self) -> dict[str, str]:
        out = self.folder / "whole"
        if not out.exists():
            done = self.run(out)
            assert done.returncode == 0, done.stderr
        return digests(out)


@pytest.fixture(scope="module")
def default(launcher, tiny, tmp_path_factory) -> Job:
    """The default method: it carries the most state from block to block."""
    return Job(launcher, tiny, tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def jobs(launcher, tiny, tmp_path_factory) -> dict[str, Job]:
    """Jobs with state of other kinds: budgets, a second stage, a head of its own, a rounded checkpoint, experts."""
    folder = tmp_path_factory.mktemp("jobs")
    half = save_llama(folder / "half", dtype=torch.bfloat16)
    save_texts(half)
    tied = save_llama(folder / "tied", tie_word_embeddings=True)
    save_texts(tied)
    options = {
        "owl": (tiny, ["--method", "sparsegpt", "--allocation", "owl"]),
        "model": (tiny, ["--method", "magnitude", "--scope", "model"]),
        "wanda": (tiny, ["--method", "wanda", "--pattern", "2:4"]),
        "head": (tied, ["--method", "sparsegpt", "--include", "lm_head", "--untie"]),
        "half": (half, ["--method", "sparsegpt", "--dtype", "float32"]),
        "reconstruct": (tiny, ["--method", "wanda", "--reconstruct"]),
        "shards": (tiny, ["--method", "wanda", "--max-shard-size", "40kB"]),
        "int8": (half, ["--method", "wanda", "--values", "int8"]),
    }
    found = {}
    for name, (model, extra) in options.items():
        (folder / f"job-{name}").mkdir()
        found[name] = Job(launcher, model, folder / f"job-{name}", *extra)
    return found


def resumed(job: Job, out: Path, point: str, *more: str):
    """Kill the job at `point`, check what it left, resume it and compare the files."""
    done = job.run(out, *more, fail=point)
    assert done.returncode == KILLED, f"{point} was not reached: {done.stderr}"
    assert out.exists() == (point == "published")
    assert (out.parent / f"{out.name}.partial").is_dir()
    done = job.run(out, *more, "--resume")
    assert done.returncode == 0, done.stderr
    assert digests(out) == job.whole()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return done


POINTS = [
    "calibration", "calibration:9",  # 4 steps per block of a Llama: block 0 and block 2
    "part", "part:3", "spill", "spill:30", "journal", "journal:3", "journal:4", "journal:5",
    "evaluate:5", "assemble:2", "verify:40", "publish", "published",
]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_named_point(default, tmp_path, point):
    resumed(default, tmp_path / "out", point, *SPILL)


@pytest.mark.parametrize("name", ["owl", "model", "wanda", "head", "half", "reconstruct", "shards", "int8"])
def test_every_kind_of_job(jobs, tmp_path, name):
    resumed(jobs[name], tmp_path / "out", "part:2")


def test_killed_again_and_again(default, tmp_path):
    out = tmp_path / "out"
    for point in ["part", "calibration", "journal:2", "part:2", "evaluate:4", "assemble", "verify:3", "publish"]:
        assert default.run(out, "--resume", fail=point).returncode == KILLED, point
        assert not out.exists()
    assert default.run(out, "--resume").returncode == 0
    assert digests(out) == default.whole()


def test_finished_blocks_are_not_pruned_again(default, tmp_path):
    done = resumed(default, tmp_path / "out", "part:3")
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("prune ") and "/" in line] == [
        "3/3"
    ]


def test_the_report_of_a_resumed_run_is_whole(default, tmp_path):
    default.whole()
    resumed(default, tmp_path / "out", "part:3")
    volatile = {"command", "time_s", "peak_memory_bytes", "stages", "output"}
    plain, found = report(default.folder / "whole"), report(tmp_path / "out")
    for document in (plain, found):
        for row in [*document["layers"], *document["evaluations"]]:
            row.pop("seconds")
    assert {k: v for k, v in found.items() if k not in volatile} == {
        k: v for k, v in plain.items() if k not in volatile
    }


def test_a_recipe_killed_in_its_second_stage(launcher, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    common = f"method: sparsegpt, calibration: {tiny}/calibration.txt, nsamples: 4, seqlen: 32"
    score = f"{{stage: evaluate, data: {tiny}/heldout.txt, seqlen: 32, windows: 2}}"
    recipe.write_text(
        f"stages:\n- {{stage: prune, sparsity: 0.3, {common}}}\n- {score}\n"
        f"- {{stage: prune, sparsity: 0.6, {common}}}\n- {score}\n- {{stage: export, format: both}}\n"
    )

    def run(out: str, *more: str, fail: str = ""):
        command = ["compress", tiny, "-o", tmp_path / out, "--recipe", recipe, *more]
        return launcher.run(*command, env={"GOSSAMER_FAILPOINT": fail})

    assert run("whole").returncode == 0
    for point in ("part:5", "evaluate:8"):
        assert run(point, fail=point).returncode == KILLED
        done = run(point, "--resume")
        assert done.returncode == 0, done.stderr
        assert digests(tmp_path / point) == digests(tmp_path / "whole"), point
        assert len(report(tmp_path / point)["evaluations"]) == 2


def test_replacing_a_folder_is_resumed_too(default, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    for point in ("part", "publish", "published"):
        assert default.run(out, "--overwrite", fail=point).returncode == KILLED
        assert (out / "old.txt").exists() == (point != "published")
        done = default.run(out, "--overwrite", "--resume")
        assert done.returncode == 0, done.stderr
        assert digests(out) == default.whole()
        assert not (out / "old.txt").exists()
        (out / "old.txt").write_text("old")


# ---- what a partial run may not be continued with --------------------------------------------------------------------


@pytest.fixture
def partial(default, tmp_path) -> Path:
    """OUT of a run that was killed inside block 1."""
    out = tmp_path / "out"
    assert default.run(out, fail="part:2").returncode == KILLED
    return out


def test_without_resume_the_command_says_so(default, partial):
    done = default.run(partial)
    assert done.returncode == 2
    assert done.errors() == [f"error: {partial}.partial holds an unfinished run"]
    assert "--resume" in done.stderr
    assert not partial.exists()
    assert default.run(partial, "--resume").returncode == 0


def test_overwrite_throws_the_partial_run_away(default, partial):
    done = default.run(partial, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "prune 1/3" in done.stderr
    assert digests(partial) == default.whole()


OTHERS = [
    (("--sparsity", "0.6"), "recipe stages 0 sparsity"),
    (("--seed", "1"), "recipe seed"),
    (("--method", "wanda"), "recipe stages 0 method"),
    (("--nsamples", "6"), "recipe stages 0 nsamples"),
    (("--dtype", "bfloat16"), "dtype"),
]


def test_another_command_is_refused_and_the_difference_named(default, partial):
    before = sorted(path.name for path in partial.with_name("out.partial").rglob("*"))
    for more, named in OTHERS:
        done = default.run(partial, "--resume", *more)
        assert done.returncode == 2, more
        (error,) = done.errors()
        assert f"the partial run had {named} = " in error
        assert "--overwrite" in done.stderr
        assert not partial.exists()
        assert sorted(path.name for path in partial.with_name("out.partial").rglob("*")) == before, more
    done = default.run(partial, "--resume")  # and the refusals did no harm
    assert done.returncode == 0
    assert digests(partial) == default.whole()


def test_max_memory_is_not_a_difference(default, partial):
    assert default.run(partial, "--resume", *SPILL).returncode == 0
    assert digests(partial) == default.whole()


@pytest.fixture
def copied(launcher, tiny, tmp_path) -> Job:
    """A job on a copy of the model that a test may change, killed inside block 1."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    job = Job(launcher, model, tmp_path, "--method", "wanda")
    assert job.run(tmp_path / "out", fail="part:2").returncode == KILLED
    return job


@pytest.mark.parametrize(("file", "named"), [("calibration.txt", "stage 0"), ("heldout.txt", "stage 1")])
def test_another_text_is_refused(copied, tmp_path, file, named):
    (copied.model / file).write_text(words(1500, 77))
    done = copied.run(tmp_path / "out", "--resume")
    assert done.returncode == 2
    assert f"text of {named}" in done.errors()[0]


def test_other_weights_are_refused(copied, tmp_path):
    path = copied.model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    done = copied.run(tmp_path / "out", "--resume")
    assert done.returncode == 2
    assert "the partial run had model = " in done.errors()[0]


def test_another_thread_count_is_refused(default, partial):
    done = default.launcher.run(*default.words(partial, "--resume"), before="import torch; torch.set_num_threads(2)")
    assert done.returncode == 2
    assert "the partial run had threads = 1, this one has 2" in done.stderr


def test_nothing_to_resume_starts_afresh_and_says_so(default, tmp_path):
    done = default.run(tmp_path / "out", "--resume")
    assert done.returncode == 0
    assert "note: nothing to resume: out.partial does not exist, starting afresh" in done.stderr
    assert digests(tmp_path / "out") == default.whole()


@pytest.mark.parametrize("content", [None, "", '{"identity": {"vers'])
def test_a_run_killed_before_it_began_starts_afresh(default, tmp_path, content):
    """The folder was made, the first line of the journal was not (or not whole)."""
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    if content is not None:
        (tmp_path / "out.partial" / "journal.jsonl").write_text(content)
    done = default.run(out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "starting afresh" in done.stderr
    assert digests(out) == default.whole()


def test_a_folder_of_somebody_else_is_not_removed(default, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    for words_ in (["--resume"], []):
        done = default.run(tmp_path / "out", *words_)
        assert done.returncode == 2, words_
        assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_a_folder_that_appeared_meanwhile_is_not_replaced(default, partial):
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    done = default.run(partial, "--resume")
    assert done.returncode == 2
    assert done.errors() == [f"error: {partial} exists and is not empty"]
    assert (partial / "thesis.txt").read_text() == "mine"
    assert default.run(partial, "--resume", "--overwrite").returncode == 0
    assert digests(partial) == default.whole()


@pytest.mark.parametrize("left", ["journal.jsonl", None])
def test_killed_at_the_end_of_tidying_up(default, tmp_path, left):
    """Only the journal, or only the empty folder, is left beside a complete OUT."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert default.run(out, fail="published").returncode == KILLED
    for path in partial.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = default.run(out, "--resume")
    assert (done.returncode, partial.exists()) == ((0, False) if left else (2, True)), done.stderr
    assert digests(out) == default.whole()


def test_killed_while_it_tidies_up(default, tmp_path):
    """OUT is complete; whatever is left of the partial folder must not be taken for an unfinished run."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert default.run(out, fail="published").returncode == KILLED
    shutil.rmtree(partial / "work")
    done = default.run(out, "--resume")
    assert done.returncode == 0, done.stderr
    assert not partial.exists()
    assert digests(out) == default.whole()


# ---- Ctrl-C and kills at random --------------------------------------------------------------------------------------


def test_interrupt_leaves_a_partial_run_that_goes_on(launcher, tiny, tmp_path):
    job = Job(launcher, tiny, tmp_path, "--method", "wanda", "--nsamples", "150")
    out = tmp_path / "out"
    running = launcher.start(*job.words(out))
    while "prune 1/3" not in running.said():
        time.sleep(0.005)
    running.signal(signal.SIGINT)
    done = running.wait()
    assert done.returncode == 130, done.stderr
    assert done.errors() == ["error: interrupted"]
    assert "hint: repeat the command with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert job.run(out, "--resume").returncode == 0
    assert digests(out) == job.whole()


def test_killed_at_random_moments(launcher, tiny, tmp_path):
    """A short job, so the moments fall everywhere, the start and the end included."""
    job = Job(launcher, tiny, tmp_path, "--method", "sparsegpt", *SPILL)
    started = time.monotonic()
    job.whole()
    _kill_at_random(job, tmp_path, random.Random(5), time.monotonic() - started, kills=6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_random_kills_of_a_long_job(launcher, tmp_path):
    model = save_llama(
        tmp_path / "model", hidden_size=192, intermediate_size=512, num_hidden_layers=8, max_position_embeddings=256
    )
    (model / "calibration.txt").write_text(words(20000, 1))
    (model / "heldout.txt").write_text(words(8000, 2))
    samples, seconds = 64, 0.0
    while seconds < 60:
        job = Job(launcher, model, tmp_path, "--seqlen", "256", "--nsamples", str(samples), "--eval-windows", "24")
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
        started = time.monotonic()
        job.whole()
        seconds = time.monotonic() - started
        samples = int(samples * max(1.3, 66 / seconds))
    _kill_at_random(job, tmp_path, random.Random(11), seconds, kills=10)


def _kill_at_random(job: Job, folder: Path, draw: random.Random, seconds: float, kills: int) -> None:
    """Kill and resume; when a run gets through before its kill, or dies behind its last step, compare and go on."""
    count, done = 0, 0
    while done < kills:
        out = folder / f"out-{count}"
        running = job.launcher.start(*job.words(out, "--resume"))
        time.sleep(draw.uniform(0, 0.7 * seconds))
        running.signal(signal.SIGKILL)
        code = running.wait().returncode
        assert code in (KILLED, 0)
        done += code == KILLED
        if code == 0 or (out.exists() and not out.with_name(f"{out.name}.partial").exists()):
            assert digests(out) == job.whole()
            count += 1
    finished = job.run(folder / f"out-{count}", "--resume")
    assert finished.returncode == 0, finished.stderr
    assert digests(folder / f"out-{count}") == job.whole()
