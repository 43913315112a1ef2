"""Everything a user can have wrong: one `error:` line, one `hint:` line, exit code 2, nothing at OUT, no traceback.

Real commands. `refused` demands in addition that not even the partial folder exists: the mistake was found before the
work began; `before_weights` that no tensor was read either.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Done, Launcher
from safetensors.torch import load_file, save_file
from tiny import save_llama

NO_READS = """
import gossamer.compress.safefile as safefile
def read(self, *arguments): raise SystemError("a weight was read")
safefile.SafeFile._read = read
"""


@pytest.fixture
def run(launcher: Launcher, tiny: Path, tmp_path: Path) -> Callable[..., Done]:
    """`gossamer compress MODEL -o OUT` with texts that fit, and the options given."""

    def go(*words: str | Path, model: Path = tiny, out: Path | str = "out", **options) -> Done:
        texts = ["--calibration", tiny / "calibration.txt", "--eval", tiny / "heldout.txt"]
        sizes = ["--nsamples", "4", "--seqlen", "32", "--eval-windows", "2"]
        return launcher.run("compress", model, "-o", out, *texts, *sizes, *words, cwd=tmp_path, **options)

    return go


def check(done: Done, message: str, hint: str | None = None, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], done.stderr
    assert message in lines[0]
    assert hint is None or hint in lines[1]
    assert done.stdout == ""


@pytest.fixture
def refused(run, tmp_path):
    """Found before anything was made: neither OUT nor OUT.partial."""

    def go(message: str, *words: str | Path, hint: str | None = None, **options) -> None:
        check(run(*words, **options), message, hint)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    return go


@pytest.fixture
def before_weights(refused):
    def go(message: str, *words: str | Path, **options) -> None:
        refused(message, *words, before=NO_READS, **options)

    return go


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """The model once more, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# ---- the model -------------------------------------------------------------------------------------------------------


def test_missing_folder(before_weights, tmp_path):
    before_weights("does not exist", model=tmp_path / "none", hint="a model folder or a hub id")


def test_a_file_as_model(before_weights, tiny):
    before_weights("is a file", model=tiny / "config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "is not a JSON object"), ("{}", "model_type"), ('{"model_type": "no"}', "`no`")],
)
def test_corrupt_config(before_weights, copy, text, message):
    (copy / "config.json").write_text(text)
    before_weights(message, model=copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(before_weights, copy, name):
    (copy / name).unlink()
    before_weights(f"has no {name}", model=copy)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_safetensors(before_weights, copy, share):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: int(share * len(data))])
    before_weights("model.safetensors", model=copy, hint="damaged or was not completely copied")


def test_missing_tensor(before_weights, copy):
    change(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    before_weights("model.layers.1.mlp.up_proj.weight", model=copy)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("options", [[], ["--method", "magnitude", "--no-eval"]])
@pytest.mark.parametrize("key", ["model.layers.2.mlp.up_proj", "model.embed_tokens", "model.norm", "lm_head"])
def test_weights_that_are_not_finite(launcher, tiny, copy, tmp_path, key, options, value):
    """Wherever they are, and found before the first block is pruned."""
    change(copy, lambda tensors: tensors[f"{key}.weight"].view(-1)[5].fill_(value))
    texts = ["--calibration", tiny / "calibration.txt", "--eval", tiny / "heldout.txt", "--seqlen", 32]
    done = launcher.run("compress", copy, "-o", "out", *(options or texts), cwd=tmp_path)
    check(done, f"tensor {key}.weight holds NaN or infinite values", "damaged")
    assert "blocks" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--calibration", "--eval"])
@pytest.mark.parametrize(("text", "message"), [("kato mi", "one window needs 32"), (" \n", "is empty")])
def test_text_shorter_than_one_window(before_weights, tmp_path, option, text, message):
    (tmp_path / "short.txt").write_text(text)
    before_weights(message, option, tmp_path / "short.txt")


def test_missing_text(before_weights):
    before_weights("missing.txt does not exist", "--eval", "missing.txt")


def test_window_longer_than_the_model(before_weights):
    before_weights("--seqlen 65 is longer than the model's 64 positions", "--seqlen", "65", hint="at most 64")
    before_weights("--eval-seqlen 70 is longer", "--eval-seqlen", "70")


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1", "-0.1", "1.5", "nan", "inf"])
def test_sparsity_outside_its_range(before_weights, value):
    before_weights(f"sparsity must be in [0, 1), got {value}", "--sparsity", value, hint="fraction of zeros")


def test_n_of_m_that_does_not_divide(before_weights):
    """All 21 matrices: nothing is gained by leaving some out."""
    message = "pattern 2:5 does not fit model.layers.0.self_attn.q_proj: its 32 inputs are not a multiple of 5"
    before_weights(f"{message}; the same with 20 more of 21", "--pattern", "2:5", hint="take an M that divides 32")


def test_n_of_m_that_fits_some(before_weights, run, tmp_path):
    """Where one kind of matrix is the obstacle, the hint names the option that leaves it out, and that works."""
    model = save_llama(tmp_path / "odd", intermediate_size=44)
    save = {"model": model, "hint": "leave them out with --exclude '(down_proj)', or take an M that divides 44"}
    before_weights("model.layers.0.mlp.down_proj: its 44 inputs are not a multiple of 8", "--pattern", "4:8", **save)
    done = run("--pattern", "4:8", "--exclude", "(down_proj)", "--dry-run", "--json", model=model)
    assert len(done.json()["matrices"]) == 18


@pytest.mark.parametrize("pattern", ["4:2", "0:4"])
def test_n_larger_than_m(before_weights, pattern):
    before_weights(f"pattern {pattern} keeps", "--pattern", pattern, hint="N is the number of weights kept")


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_regex_that_matches_nothing_or_is_none(before_weights, option):
    before_weights(f"{option} 'no_such' matches no matrix", option, "no_such", hint="model.layers.0.self_attn.q_proj")
    before_weights("'(' is not a valid regular expression", option, "(", hint="backslash")


def test_nothing_left(before_weights):
    before_weights("nothing is left to prune", "--exclude", ".", hint="--include and --exclude")


def test_tied_head_needs_untie(before_weights, run, tmp_path):
    model = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    before_weights("lm_head shares its weight", "--include", "lm_head", model=model, hint="add --untie")
    done = run("--include", "lm_head", "--untie", "--method", "magnitude", "--json", "-q", model=model)
    rows = {row["name"] for row in done.json()["layers"]}
    assert "lm_head" in rows
    assert len(rows) == 22


def test_int8_values_of_nothing(before_weights, tmp_path, run):
    words = ["--activation", "threshold", "--activation-sparsity", "0.5", "--values", "int8"]
    before_weights("nothing here is pruned", *words, hint="--sparsity 0.5")
    pruned = run("--method", "magnitude", "-q", out=tmp_path / "pruned")
    assert pruned.returncode == 0
    assert run(*words, "--dry-run", model=tmp_path / "pruned").returncode == 0


def test_every_mistake_at_once(before_weights):
    words = ["--pattern", "2:5", "--eval", "missing.txt"]
    before_weights("2 problems: pattern 2:5 does not fit", *words)
    before_weights("missing.txt does not exist", *words)


def test_underscores(run, tmp_path):
    words = ["--eval_seqlen", "16", "--max_memory", "1GiB", "--allow_overlap", "--max_shard_size", "1MB", "--dry_run"]
    assert run(*words, "--eval_windows", "3").returncode == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stages: [{stage: prune, sparsty: 0.5}]", "stages.0.sparsty is no field", "sparsity, pattern, method"),
        ("stages: [{stage: prune, sparsty: 0.5}]", "did you mean sparsity?", None),
        ("seeds: 1\nstages: [{stage: prune}]", "seeds is no field of a recipe; did you mean seed?", "stages, seed"),
        ("stages: [{stage: fry}]", "stages.0: stage 'fry' is unknown; allowed: prune, imp,", None),
        ("stages: [{sparsity: 0.5}]", "stages.0 does not say which stage it is", "`stage:`"),
        ("stages: 5", "stages must be a list, got 5", "[a, b]"),
        ("stages: []", "stages needs at least 1 entry", "a minimal recipe"),
        ("stages: [{stage: prune, sparsity: 2}]", "sparsity must be in [0, 1), got 2", "fraction of zeros"),
        ("stages: [{stage: prune, nsamples: 0}]", "nsamples must be greater than or equal to 1, got 0", "--help"),
        ("stages: [{stage: prune, scope: bed}]", "must be 'row', 'matrix' or 'model', got 'bed'", "--help"),
        ("stages: [{stage: export, max_shard_size: big}, {stage: prune}]", "'big' is not a size", "8GiB"),
        ("stages: [", "is not valid YAML", "a minimal recipe"),
    ],
)
def test_recipes(launcher, tiny, tmp_path, text, message, hint):
    (tmp_path / "r.yaml").write_text(text)
    done = launcher.run("compress", tiny, "-o", "out", "--recipe", "r.yaml", cwd=tmp_path, before=NO_READS)
    check(done, message, hint)
    assert "recipe r.yaml" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_output_folder_is_not_empty(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    check(run(before=NO_READS), "exists and is not empty", "--overwrite")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("place", ["out", "out/below", "out/far/below"])
def test_a_file_where_the_folder_should_be(run, tmp_path, place):
    (tmp_path / "out").write_text("mine")
    message = "exists and is not empty" if place == "out" else "is a file, no folder can be made in it"
    check(run(out=place, before=NO_READS), message)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_model_is_never_overwritten(run, copy, tmp_path):
    before = (copy / "model.safetensors").read_bytes()
    check(run("--overwrite", model=copy, out=copy, before=NO_READS), "is the model itself", "another folder")
    check(run("--overwrite", model=copy, out=tmp_path, before=NO_READS), "holds the model", "another folder")
    assert (copy / "model.safetensors").read_bytes() == before


def test_no_permission(run, tmp_path):
    """Modes do not bind root; where they do not, the answer of the system call is put in its place."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    deny = f"import os\nold = os.access\nos.access = lambda p, m, **k: str(p) != {str(place)!r} and old(p, m, **k)\n"
    before = NO_READS + (deny if os.access(place, os.W_OK) else "")
    check(run(out=place / "out", before=before), f"no permission to write in {place}", "may write to")
    assert not list(place.iterdir())


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write() then fails with EFBIG, as it does with ENOSPC on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (400, []),  # the journal's first line
        (3000, ["--max-memory", "1B"]),  # hidden states that do not fit into memory
        (20000, []),  # the first block
        (90000, []),  # the checkpoint, put together from blocks that did fit
    ],
)
def test_disk_full(run, tmp_path, size, words):
    done = run(*words, before=LIMITED.format(size=size))
    check(done, "File too large")
    assert not (tmp_path / "out").exists()
    again = run(*words, "--resume")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "report.json").exists()
    assert not (tmp_path / "out.partial").exists()


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["prune 1/3", "evaluate before: 3"])
def test_ctrl_c(launcher, tiny, tmp_path, line):
    slow = "import gossamer.compress.blocks as b, time\nold = b.StreamedModel.run_block\n"
    slow += "def run(*a, **k):\n    time.sleep(0.05)\n    return old(*a, **k)\nb.StreamedModel.run_block = run\n"
    texts = ["--calibration", tiny / "calibration.txt", "--eval", tiny / "heldout.txt"]
    words = ["compress", tiny, "-o", "out", *texts, "--nsamples", "8", "--seqlen", "32"]
    running = launcher.start(*words, cwd=tmp_path, before=slow)
    end = time.monotonic() + 60
    while line not in running.said() and time.monotonic() < end:
        time.sleep(0.02)
    running.signal(signal.SIGINT)
    done = running.wait()
    check(done, "interrupted", "--resume", code=130)
    assert not (tmp_path / "out").exists()
    again = launcher.run(*words, "--resume", "--json", "-q", cwd=tmp_path)
    assert json.loads(again.stdout)["sparsity"]["zeros"] > 0
    assert (tmp_path / "out" / "report.json").exists()
