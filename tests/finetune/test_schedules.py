"""Every schedule against values worked out by hand: 8 retraining steps, peak 0.8."""

from __future__ import annotations

import math

import pytest

from gossamer.errors import RecipeError
from gossamer.finetune.schedules import SCHEDULES, Rates, get_schedule, warmup_steps

HISTORY = (0.8, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05)
PLAIN = Rates(0.8, warmup=0.0)


def rates(name: str, total: int, given: Rates) -> list[float]:
    return [get_schedule(name)(step, total, given) for step in range(total)]


BY_HAND = {
    "ft": (Rates(0.8, floor=0.05), [0.05] * 8),
    "ft, known": (Rates(0.8, history=HISTORY), [0.05] * 8),
    "ft, nothing known": (Rates(0.8), [0.8] * 8),
    "lrw": (Rates(0.8, history=HISTORY), [0.4, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05]),
    "slr": (Rates(0.8, history=HISTORY, warmup=0.0), [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1]),
    "clr": (PLAIN, [0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]),
    "llr": (PLAIN, [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    "allr": (Rates(0.8, damage=0.3, pruned=0.36, warmup=0.0), [0.4 * (1 - k / 8) for k in range(8)]),
    "allr, at most the peak": (Rates(0.8, damage=0.9, pruned=0.25, warmup=0.0), [0.8 * (1 - k / 8) for k in range(8)]),
    "allr, at least its span": (
        Rates(0.8, damage=0.01, pruned=0.25, span=0.5, warmup=0.0),
        [0.4 * (1 - k / 8) for k in range(8)],
    ),
    "allr, nothing pruned": (Rates(0.8, damage=0.0, pruned=0.0, warmup=0.0), [0.8 * (1 - k / 8) for k in range(8)]),
    "allr, nothing pruned, at its span": (
        Rates(0.8, damage=0.0, pruned=0.0, span=0.25, warmup=0.0),
        [0.2 * (1 - k / 8) for k in range(8)],
    ),
    # A quarter of the steps rise along half a cosine: 2 of 8, at 1/3 and 2/3 of it; the schedule takes the other 6.
    "llr, warm": (Rates(0.8, warmup=0.25), [0.2, 0.6, *(0.8 * (1 - k / 6) for k in range(6))]),
    "clr, warm": (
        Rates(0.8, floor=0.2, warmup=0.25),
        [0.2, 0.6, *(0.2 + 0.3 * (1 + math.cos(math.pi * k / 6)) for k in range(6))],
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    given, expected = BY_HAND[case]
    assert rates(case.partition(",")[0], 8, given) == pytest.approx(expected)


def test_the_table_is_complete():
    assert list(SCHEDULES) == ["ft", "lrw", "slr", "clr", "llr", "allr"]
    assert {case.partition(",")[0] for case in BY_HAND} == set(SCHEDULES)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("name", ["clr", "llr"])
def test_no_step_is_wasted(name, total):
    """Every rate is positive and none above the peak, whatever the length."""
    found = rates(name, total, Rates(0.8, warmup=0.1))
    assert all(0 < rate <= 0.8 for rate in found)
    assert max(found) == 0.8
    assert warmup_steps(total, 0.1) < total


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("lrw", Rates(0.8), "needs the learning rates of the dense training"),
        ("slr", Rates(0.8), "needs the learning rates of the dense training"),
        ("lrw", Rates(0.8, history=(0.1,) * 7), "the last 8 steps of the dense training, which had 7"),
        ("allr", Rates(0.8), "needs the damage"),
        ("allr", Rates(0.8, damage=0.1, pruned=-0.1), "needs the damage"),
    ],
)
def test_what_is_missing(name, given, match):
    with pytest.raises(RecipeError, match=match):
        rates(name, 8, given)


def test_unknown():
    with pytest.raises(RecipeError, match="'cosine' is unknown; allowed: ft, lrw"):
        get_schedule("cosine")
