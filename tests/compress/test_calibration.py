"""Statistics equal their definitions, computed here the naive way in float64."""

import pytest
import torch

from gossamer.compress.calibration import Accumulator
from gossamer.compress.sums import OuterSum
from gossamer.pruning import base

CPU = torch.device("cpu")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (700, 700), (1100, 3)])
def test_outer_sum(size, symmetric):
    rows, cols = size
    if symmetric and rows != cols:
        cols = rows
    total = OuterSum(rows, cols, CPU, symmetric=symmetric)
    expected = torch.zeros(rows, cols, dtype=torch.float64)
    for seed in range(3):
        a = torch.randn(9, rows, generator=torch.Generator().manual_seed(seed))
        b = a if symmetric else torch.randn(9, cols, generator=torch.Generator().manual_seed(seed + 50))
        total.add(a, b)
        expected += a.double().T @ b.double()
    taken = total.take()
    assert torch.allclose(taken.double(), expected, rtol=1e-5, atol=1e-5)
    if symmetric:
        assert torch.equal(taken, taken.T)


def test_the_order_of_the_windows_does_not_change_a_bit():
    windows = [torch.randn(64, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    forward, backward = (OuterSum(40, 40, CPU, symmetric=True) for _ in range(2))
    for window in windows:
        forward.add(window, window)
    for window in reversed(windows):
        backward.add(window, window)
    assert torch.equal(forward.take(), backward.take())


def accumulate(writers: frozenset[str], more: frozenset[str] = frozenset(), *, unpruned: bool = False):
    generator = torch.Generator().manual_seed(1)
    weights = {"a": torch.randn(6, 10, generator=generator), "b": torch.randn(4, 10, generator=generator)}
    needs = frozenset({"gram", "target", "holdout", "norm"}) | more
    sums = Accumulator(10, needs, 3, {"a": 6, "b": 4}, weights, writers, CPU, unpruned=unpruned)
    seen = []
    for _ in range(5):
        x, dense = (torch.randn(20, 10, generator=generator) for _ in range(2))
        errors = {name: torch.randn(20, len(weights[name]), generator=generator) for name in writers}
        sums.add(x, dense, errors)
        seen.append((x, dense, errors))
    return sums.finish(), weights, seen


@pytest.mark.parametrize("writers", [frozenset(), frozenset({"b"}), frozenset({"a", "b"})])
def test_gram_target_norm_and_holdout(writers):
    stats, weights, seen = accumulate(writers)
    x = torch.cat([entry[0] for entry in seen]).double()
    for name, weight in weights.items():
        y = torch.cat([wanted(entry, name, weight) for entry in seen]).double()
        assert stats[name].tokens == 100
        assert torch.allclose(stats[name].gram.double(), x.T @ x, rtol=1e-5, atol=1e-4)
        assert torch.allclose(stats[name].norm.double(), x.norm(dim=0), rtol=1e-6)
        assert torch.allclose(stats[name].target.double(), y.T @ x, rtol=1e-4, atol=1e-3)
        last = [row for start in range(0, 100, 20) for row in range(start + 17, start + 20)]
        assert torch.equal(stats[name].holdout.x.double(), x[last])
        assert torch.allclose(stats[name].holdout.y.double(), y[last], atol=1e-5)


@pytest.mark.parametrize("unpruned", [True, False])
@pytest.mark.parametrize("writers", [frozenset(), frozenset({"b"}), frozenset({"a", "b"})])
def test_large_matrices_get_the_excess_instead_of_the_target(writers, unpruned, monkeypatch):
    known, weights, _ = accumulate(writers)
    more = frozenset({"excess"})
    small, _, _ = accumulate(writers, more, unpruned=unpruned)
    monkeypatch.setattr(base, "LARGE", 0)
    large, _, _ = accumulate(writers, more, unpruned=unpruned)
    for name, weight in weights.items():
        assert torch.equal(small[name].target, known[name].target)
        assert small[name].excess is None
        if name not in writers and not unpruned:  # the weight that is pruned is not the one the target was made with
            assert torch.equal(large[name].target, known[name].target)
            assert large[name].excess is None
            continue
        assert large[name].target is None
        expected = known[name].target - weight @ known[name].gram
        assert torch.allclose(large[name].excess, expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(large[name].gram, known[name].gram)


def test_norms_are_measured_where_they_are_needed():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    for needs, measured in (({"gram"}, False), ({"gram", "norm"}, True), (set(), True)):
        sums = Accumulator(4, frozenset(needs), 0, {"a": 6}, {}, frozenset(), CPU)
        sums.add(x, None)
        norm = sums.finish()["a"].norm
        assert (norm is not None) == measured
        if norm is not None:
            assert torch.allclose(norm, x.norm(dim=0))


def wanted(entry, name, weight):
    x, dense, errors = entry
    return x @ weight.T + errors[name] if name in errors else dense @ weight.T


def test_any_sample_left_out_changes_the_gram():
    full = accumulate(frozenset())[0]["a"].gram
    seen = accumulate(frozenset())[2]
    for left_out in range(5):
        sums = Accumulator(10, frozenset({"gram"}), 0, {"a": 6}, {}, frozenset(), CPU)
        for index, (x, _, _) in enumerate(seen):
            if index != left_out:
                sums.add(x, None)
        assert not torch.equal(sums.finish()["a"].gram, full)
