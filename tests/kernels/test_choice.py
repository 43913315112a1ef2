"""Kernel or dense: what is measured, remembered and overruled. Nothing here depends on how long anything takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from gossamer.errors import KernelError
from gossamer.kernels import choice, choice_cache, extension, tier
from gossamer.kernels.bench import rounds
from gossamer.kernels.bench.rounds import Contender
from gossamer.kernels.choice import Choice, choose

needs_module = pytest.mark.skipif(extension.compiled() is None, reason="no compiled module: nothing is measured")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, an empty table, and rounds that take no time."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_known", {})
    choice_cache._warn.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def timed(monkeypatch):
    """Times by contender, 5000 and 1000 per call of sparse and dense unless a test says otherwise, and who asked."""

    class Timed:
        sparse, dense, calls = 5000.0, 1000.0, []

    answer = Timed()
    answer.calls = []

    def run_rounds(contenders, most, *, warm, after, clock):
        assert [set(warm), {each.name for each in contenders}] == [{each.name for each in contenders}] * 2
        answer.calls.append(torch.get_num_threads())
        for contender in contenders:
            assert contender.call().shape[0] == 1
        sparse, dense = (each.name for each in contenders)
        return {sparse: [answer.sparse] * 12, dense: [answer.dense] * 12}

    monkeypatch.setattr(choice, "run_rounds", run_rounds)
    return answer


@needs_module
def test_a_real_measurement():
    found = choose("bitmask", 70, 100, BF16, 0.5)
    assert found.measured
    assert 0 < found.sparse_us < math.inf
    assert 0 < found.dense_us < math.inf
    assert found.sparse == (found.sparse_us <= 1.03 * found.dense_us)
    assert choose("bitmask", 70, 100, BF16, 0.5) == found


@needs_module
@pytest.mark.parametrize(("sparse", "expected"), [(900.0, True), (1030.0, True), (1031.0, False)])
def test_at_most_three_percent_slower(timed, sparse, expected):
    timed.sparse = sparse
    assert choose("bitmask", 8, 64, BF16, 0.5) == Choice(expected, sparse, 1000.0, True)


@needs_module
def test_measured_once_and_remembered_in_the_folder(timed, folder, monkeypatch):
    first = choose("bitmask", 8, 64, BF16, 0.5)
    count = len(timed.calls)
    assert choose("bitmask", 8, 64, BF16, 0.5) == first
    assert choose("bitmask", 8, 64, BF16, 0.512) == first, "sparsities are rounded to 5 %"
    assert len(timed.calls) == count
    monkeypatch.setattr(choice, "_known", {})  # as in another process
    assert choose("bitmask", 8, 64, BF16, 0.5) == first
    assert len(timed.calls) == count
    (file,) = folder.iterdir()
    document = json.loads(file.read_text())
    assert document["microseconds"] == {"bitmask 8x64 bfloat16 50%": [5000.0, 1000.0]}
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["machine"]["tier"] == tier.current().name


@needs_module
def test_what_the_answer_depends_on(timed, folder):
    """Another shape, dtype or sparsity is another entry; another tier or number of threads another file."""
    for rows, cols, dtype, density in [(8, 64, BF16, 0.5), (9, 64, BF16, 0.5), (8, 65, BF16, 0.5),
                                       (8, 64, torch.float16, 0.5), (8, 64, BF16, 0.55)]:  # fmt: skip
        before = len(timed.calls)
        choose("bitmask", rows, cols, dtype, density)
        assert len(timed.calls) > before
    (file,) = folder.iterdir()
    assert len(json.loads(file.read_text())["microseconds"]) == 5
    with tier.forced("scalar"):
        choose("bitmask", 8, 64, BF16, 0.5)
    assert len(list(folder.iterdir())) == (1 if tier.current().name == "scalar" else 2)


@needs_module
@pytest.mark.parametrize(
    "text",
    [
        "", "not JSON", "[]", "{}", '{"machine": {}, "microseconds": {}}',
        "ENTRY[1]", 'ENTRY["a", 1]', "ENTRY[0, 1]", "ENTRY[NaN, 1]", "ENTRY[Infinity, 1]", "ENTRY[-1, 1]", "ENTRYnull",
        "OTHER[1, 2]",
    ],
)  # fmt: skip
def test_damaged_or_foreign_files_are_as_good_as_none(timed, folder, monkeypatch, text):
    choose("bitmask", 8, 64, BF16, 0.5)
    (file,) = folder.iterdir()
    document = json.loads(file.read_text())
    machine = json.dumps(document["machine"])
    if text.startswith("OTHER"):
        machine = json.dumps({**document["machine"], "processor": "another"})
    for mark in ("ENTRY", "OTHER"):
        if text.startswith(mark):
            entry = text.removeprefix(mark)
            text = f'{{"machine": {machine}, "microseconds": {{"bitmask 8x64 bfloat16 50%": {entry}}}}}'
    file.write_text(text)
    monkeypatch.setattr(choice, "_known", {})
    count = len(timed.calls)
    assert choose("bitmask", 8, 64, BF16, 0.5) == Choice(False, 5000.0, 1000.0, True)
    assert len(timed.calls) > count
    assert json.loads(file.read_text()) == document, "the file is whole again"


@needs_module
def test_a_file_keeps_what_another_process_added(timed, folder):
    choose("bitmask", 8, 64, BF16, 0.5)
    (file,) = folder.iterdir()
    document = json.loads(file.read_text())
    document["microseconds"]["bitmask 1x1 bfloat16 0%"] = [1.0, 2.0]
    file.write_text(json.dumps(document))
    choose("bitmask", 8, 128, BF16, 0.5)
    assert len(json.loads(file.read_text())["microseconds"]) == 3
    assert [path.name for path in folder.iterdir()] == [file.name], "nothing partial is left"


@needs_module
def test_unwritable_folder_means_one_warning_and_a_measurement(timed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="cannot be remembered .*GOSSAMER_CACHE"):
        assert choose("bitmask", 8, 64, BF16, 0.5).measured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("bitmask", 8, 65, BF16, 0.5).measured


@needs_module
def test_a_busy_machine_is_not_believed(timed, folder, monkeypatch):
    """All threads take longer than one: something else holds them up. Then one thread decides, and nothing is kept."""
    real = choice.run_rounds

    def busy(contenders, most, *, warm, after, clock):
        times = real(contenders, most, warm=warm, after=after, clock=clock)
        sparse, dense = times
        if len(timed.calls) == 1:  # one thread comes first
            return {sparse: [2000.0] * 12, dense: [4000.0] * 12}
        return {sparse: [8000.0] * 12, dense: [8000.0] * 12}

    monkeypatch.setattr(choice, "run_rounds", busy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert choose("bitmask", 8, 64, BF16, 0.5) == Choice(True, 2000.0, 4000.0, True)
    assert len(timed.calls) == 2
    assert not folder.exists()


def test_settled_means_that_the_best_comes_back():
    assert choice._settled({"a": [9.0, 1.0, 1.04, 1.02], "b": [2.0, 2.0, 2.0]})
    assert not choice._settled({"a": [1.0, 1.0, 1.06], "b": [2.0, 2.0, 2.0]})
    assert not choice._settled({"a": [1.0, 1.0]})


@needs_module
def test_large_weights_are_measured_in_part(timed, monkeypatch):
    seen = []
    real = choice._contenders
    monkeypatch.setattr(choice, "_contenders", lambda op, *shape: seen.append(shape[:2]) or real(op, *shape))
    monkeypatch.setattr(choice, "_MOST_BYTES", 64 * 2 * 10)
    assert choose("bitmask", 40, 64, BF16, 0.5) == Choice(False, 20000.0, 4000.0, True)
    assert seen[0] == (10, 64)


@needs_module
def test_both_contenders_have_the_same_weight():
    """The measured products agree up to rounding, at a sparsity of 0, where they compute the same."""
    sparse, dense = choice._contenders("bitmask", 150, 100, BF16, 0.0)
    assert torch.allclose(sparse.call().float(), dense.call().float(), rtol=2**-6, atol=1e-3)
    assert choice._contenders("bitmask", 150, 100, BF16, 1.0)[0].call().count_nonzero() == 0


@needs_module
def test_loading_contexts_do_not_reach_the_measurement(timed):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert choose("bitmask", 8, 64, BF16, 0.5).measured
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("mode", "sparse"), [("sparse", True), ("dense", False)])
def test_the_environment_overrules(timed, folder, monkeypatch, mode, sparse):
    monkeypatch.setenv(choice.VARIABLE, mode)
    found = choose("bitmask", 4096, 4096, BF16, 0.5)
    assert (found.sparse, found.measured) == (sparse, False)
    assert math.isnan(found.sparse_us)
    assert not timed.calls
    assert not folder.exists()


def test_without_compiled_kernels_dense_is_the_answer(timed):
    with tier.forced(None):
        found = choose("bitmask", 8, 64, BF16, 0.5)
    assert (found.sparse, found.measured) == (False, False)
    assert not timed.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int3", 8, 64, BF16, 0.5), "'int3' is unknown, allowed: bitmask"),
        (("bitmask", 0, 64, BF16, 0.5), r"a weight \[0, 64\]"),
        (("bitmask", 8, 64, BF16, 1.5), "density 1.5"),
        (("bitmask", 8, 64, BF16, math.nan), "density nan"),
        pytest.param(("bitmask", 8, 64, torch.float32, 0.5), "float32, allowed", marks=needs_module),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(KernelError, match=message):
        choose(*arguments)


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "fastest")
    with pytest.raises(KernelError, match="'fastest', allowed: measured, sparse, dense"):
        choose("bitmask", 8, 64, BF16, 0.5)


@needs_module
def test_other_operations_can_be_added(timed, monkeypatch):
    build = lambda x, weight, mask: Contender("mine", lambda: x @ (weight * mask).t())
    monkeypatch.setitem(choice.OPERATIONS, "mine", build)
    assert choose("mine", 8, 64, BF16, 0.5).measured


@needs_module
def test_threads_that_ask_at_once_share_one_measurement(timed):
    found: list[Choice] = []
    asking = [threading.Thread(target=lambda: found.append(choose("bitmask", 8, 64, BF16, 0.5))) for _ in range(8)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert len(timed.calls) <= 2


def test_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("GOSSAMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice_cache.folder() == tmp_path / "gossamer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert choice_cache.folder() == tmp_path / "home" / ".cache" / "gossamer"


def test_import_measures_nothing(tmp_path):
    code = (
        "import time, gossamer.kernels.bench.rounds as r\n"
        "r.run_rounds = None\nimport gossamer.kernels.choice as c\nassert not c._known"
    )
    environment = {**os.environ, "GOSSAMER_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_rounds_are_interleaved_and_stop_when_told(monkeypatch):
    monkeypatch.setattr(rounds, "unrelated_bytes", lambda: 4096)
    order = []
    contenders = [Contender(name, lambda name=name: order.append(name) or torch.zeros(1)) for name in "abc"]
    warm = {"a": lambda: order.append("warm a") or torch.zeros(1)}
    told = []
    times = rounds.run_rounds(contenders, 50, warm=warm, after=lambda done, _: told.append(done) or done == 4)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert told == [1, 2, 3, 4]
    assert all(order[i - 1] == "warm a" for i, name in enumerate(order) if name == "a")
    calls = [name for name in order if name in "abc"]
    assert all(sorted(calls[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))
    assert len({tuple(calls[i : i + 3]) for i in range(0, 12, 3)}) > 1, "always in the same order"


def test_best_decile():
    assert rounds.summary([5.0, 3.0, 4.0]) == rounds.Timing(3.0, 3.0, 4.0)
    assert rounds.summary([float(i) for i in range(40, 0, -1)]) == rounds.Timing(1.0, 4.0, 20.5)
