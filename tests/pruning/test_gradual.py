"""The cubic schedule by hand."""

from __future__ import annotations

import pytest

from gossamer.errors import RecipeError
from gossamer.pruning.gradual import Cubic


def test_the_curve_by_hand() -> None:
    curve = Cubic(final=0.8, begin=10, end=50, every=10)
    # 1 - (1 - t)^3 of 0.8 at t = 0, 1/4, 1/2, 3/4, 1.
    assert [curve.sparsity(step) for step in (0, 10, 20, 30, 40, 50, 99)] == pytest.approx(
        [0.0, 0.0, 0.8 * 37 / 64, 0.7, 0.8 * 63 / 64, 0.8, 0.8]
    )
    assert curve.sparsity(50) == 0.8
    rising = Cubic(final=0.9, begin=0, end=8, initial=0.5)
    assert rising.sparsity(0) == 0.5
    assert rising.sparsity(4) == pytest.approx(0.85)


def test_when_the_mask_changes() -> None:
    curve = Cubic(final=0.5, begin=4, end=11, every=3)
    assert [step for step in range(30) if curve.tightens(step)] == [4, 7, 10, 11]
    assert [curve.holds(step) for step in range(13)] == [
        curve.sparsity(last) for last in (0, 0, 0, 0, 4, 4, 4, 7, 7, 7, 10, 11, 11)
    ]
    values = [curve.holds(step) for step in range(13)]
    assert values == sorted(values)


def test_one_shot_when_begin_is_end() -> None:
    curve = Cubic(final=0.5, begin=3, end=3)
    assert [curve.holds(step) for step in (2, 3, 4)] == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    "wrong",
    [{"final": 1.0}, {"final": 0.4, "initial": 0.5}, {"begin": 9, "end": 8}, {"every": 0}, {"begin": -1}],
)
def test_bad_schedules(wrong: dict) -> None:
    with pytest.raises(RecipeError):
        Cubic(**{"final": 0.8, "begin": 0, "end": 10, **wrong})
