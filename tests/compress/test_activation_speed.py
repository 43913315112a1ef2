"""The sparsity of a wanted speed-up: which products are timed, and what follows from their times."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from exports import save_family_sparse
from families import VOCAB, save_family

from gossamer.activation_sparsity.threshold import Threshold
from gossamer.compress.activation import products as made
from gossamer.compress.activation.calibrate import Calibration
from gossamer.compress.activation.products import SHARES, Product, measured, products, runtime_dtype
from gossamer.compress.activation.speed import falling, sparsity_for
from gossamer.compress.blocks import StreamedModel
from gossamer.compress.journal import Journal
from gossamer.compress.source import open_source
from gossamer.compress.stages import activation as stage
from gossamer.errors import RecipeError

MAP, HEAD = Product("inputs", (64, 64)), Product("whole", (90, 64))


def ideal(product):
    """Half of the time is what skipping saves."""
    return 10.0, [10.0 - 5.0 * share for share in SHARES] if product.kind != "whole" else []


def test_the_lowest_sparsity_that_is_fast_enough():
    assert sparsity_for({MAP: 3}, ideal, 1.0, 1.25, print) == pytest.approx(0.4)
    assert sparsity_for({MAP: 3}, ideal, 0.5, 1.25, print) == pytest.approx(0.2)  # of what can be skipped, 40 %
    assert sparsity_for({MAP: 1, HEAD: 1}, ideal, 1.0, 1.25, print) == pytest.approx(0.8)
    # a fifth of the tokens skip nothing: 1 / (0.2 + 0.8 * 0.75) at 50 %
    assert sparsity_for({MAP: 3}, ideal, 0.8, 1.25, print, 0.2) == pytest.approx(0.4)
    assert sparsity_for({MAP: 3}, lambda _: (10.0, [1.0] * len(SHARES)), 1.0, 1.01, print) > 0  # never nothing


def test_a_map_that_is_slower_counts_as_slower():
    slow = Product("inputs", (8, 8))
    times = lambda p: (10.0, [20.0] * len(SHARES)) if p == slow else ideal(p)
    with pytest.raises(RecipeError, match=r"90% gives 0\.78 times") as caught:
        sparsity_for({MAP: 1, slow: 1}, times, 1.0, 1.2, print)
    assert "nothing is gained on this machine" in caught.value.hint
    with pytest.raises(RecipeError) as caught:
        sparsity_for({MAP: 1}, ideal, 1.0, 3, print)
    assert caught.value.hint == "ask for at most 1.81"


def test_times_never_rise_with_what_is_skipped():
    assert falling([5.0, 4.0, 3.0]) == [5.0, 4.0, 3.0]
    assert falling([5.0, 3.0, 4.0, 2.0]) == [5.0, 3.5, 3.5, 2.0]
    assert falling([1.0, 2.0, 3.0]) == [2.0, 2.0, 2.0]


def calibration_of(folder, tmp_path):
    source = open_source(str(folder))
    model = StreamedModel.open(source, source.folder, dtype=torch.float32)
    windows = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return source, Calibration(model, windows, Threshold(), memory_bytes=1 << 26, scratch=scratch)


def counted(folder, tmp_path, method, dtype):
    source, calibration = calibration_of(folder, tmp_path)
    blocks = [calibration.found[i] for i in range(calibration.model.num_blocks)]
    return products(calibration.model, blocks, source, method, dtype)


@pytest.mark.parametrize(("method", "kind"), [("coreinfer", "cores"), ("cats", "gate")])
def test_attention_is_whole_where_neurons_are_skipped(tmp_path, method, kind):
    found = counted(save_family("llama", tmp_path / "m"), tmp_path, method, torch.float32)
    assert Counter(p.kind for p in found.elements()) == {"whole": 3 * 4 + 1, kind: 3}
    (mlp,) = [p for p in found if p.kind == kind]
    assert mlp == Product(kind, (80, 48), (1.0, 1.0, 1.0))
    dense, sparse = measured(mlp, torch.float32, rounds=2)
    assert dense > 0
    assert len(sparse) == len(SHARES)


def test_an_mlp_without_a_gate_is_whole(tmp_path):
    found = counted(save_family("opt", tmp_path / "m"), tmp_path, "coreinfer", torch.float32)
    assert {p.kind for p in found} == {"whole"}


def test_pruned_weights_are_timed_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "choose", lambda *_: SimpleNamespace(sparse=True))
    folder = save_family_sparse("llama", tmp_path / "m", dtype=torch.bfloat16)
    found = counted(folder, tmp_path, "auto", torch.bfloat16)
    inputs = [p for p in found if p.kind == "inputs"]
    assert all(0 < p.kept[0] < 1 for p in inputs)
    names = {one.name: one.call for one in made._contenders(inputs[0], inputs[0].shape, torch.bfloat16)}
    assert names["without"].func is made.packed_gemv.bitmask_gemv
    assert names["0.5"].func is made.dual.dual_gemv
    dense, sparse = measured(inputs[0], torch.bfloat16, rounds=2)
    assert dense > 0
    assert len(sparse) == len(SHARES)


def test_int8_values_are_whole(tmp_path):
    from gossamer.compress.convert import convert

    folder = save_family_sparse("llama", tmp_path / "m", dtype=torch.bfloat16)
    convert(folder, tmp_path / "int8", "sparse", values="int8")
    assert {p.kind for p in counted(tmp_path / "int8", tmp_path, "auto", torch.bfloat16)} == {"whole"}


def test_the_model_s_own_dtype_is_timed():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert runtime_dtype(dtype) is dtype
    assert runtime_dtype(torch.float64) is runtime_dtype(None) is torch.bfloat16


def test_a_resumed_run_goes_on_with_what_was_measured(tmp_path, monkeypatch):
    times = iter([1.0, 2.0])  # a second measurement would give another sparsity

    def measure(product, dtype):
        slower = next(times)
        return 10.0, [10.0 - 5.0 * share / slower for share in SHARES]

    monkeypatch.setattr(stage, "products", lambda *_: {MAP: 1})
    monkeypatch.setattr(stage, "measured", measure)

    def goal(journal):
        run = stage._Run.__new__(stage._Run)
        run.plan, run.stage = SimpleNamespace(name="activation-0"), SimpleNamespace(target_speedup=1.25, method="auto")
        run.model = SimpleNamespace(config=SimpleNamespace(dtype=torch.float32), num_blocks=0)
        run.context = SimpleNamespace(
            journal=journal, written=lambda: None, progress=SimpleNamespace(note=lambda _: None)
        )
        return run._measured_goal(SimpleNamespace(found={}, reachable=1.0, method=SimpleNamespace(watched=0.0)))

    first = goal(Journal.start(tmp_path / "out.partial", {"a": 1}))
    assert first == pytest.approx(0.4)
    assert goal(Journal.resume(tmp_path / "out.partial", {"a": 1})) == first
