"""Several gloo processes give the files of one process bit for bit, and tell a mistake once."""

from __future__ import annotations

import random
import signal

import pytest
from families import VOCAB, save_family
from groups import SPILL, Group, one_error
from safetensors.torch import load_file, save_file
from tiny import digests, report, save_llama, save_texts, save_words

KILLED = -signal.SIGKILL


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
