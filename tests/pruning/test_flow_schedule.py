"""Schedules of progressive N:M flow: frames, beta and freezing as numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from gossamer.errors import RecipeError
from gossamer.pruning.flow_schedule import KINDS, FlowSchedule, Phase, geometric_frames, stepwise_frames
from gossamer.pruning.pattern import NM, parse_pattern


def written(frames: tuple[NM, ...]) -> str:
    return " ".join(map(str, frames))


@pytest.mark.parametrize(
    ("target", "frames"),
    [
        ("1:8", "7:8 4:8 2:8 1:8"),
        ("1:4", "3:4 2:4 1:4"),
        ("2:8", "7:8 4:8 2:8"),
        ("1:16", "15:16 8:16 4:16 2:16 1:16"),
        ("2:4", "3:4 2:4"),
        ("1:2", "1:2"),
        ("3:8", "7:8 4:8 3:8"),
        ("3:4", "3:4"),
        ("4:4", "4:4"),
    ],
)
def test_stepwise_frames(target: str, frames: str) -> None:
    pattern = parse_pattern(target)
    assert isinstance(pattern, NM)
    assert written(stepwise_frames(pattern)) == frames


def test_geometric_frames_keep_the_sparsity() -> None:
    frames = geometric_frames(NM(1, 8))
    assert written(frames) == "8:64 4:32 2:16 1:8"
    assert {frame.sparsity for frame in frames} == {7 / 8}


def test_a_frame_that_does_not_divide_is_left_out_and_named() -> None:
    schedule = FlowSchedule("sdgf-geometric", NM(1, 8), 48, 100, tail=0.1)  # 48 = 3 * 16: neither 64 nor 32
    assert written(schedule.frames) == "2:16 1:8"
    assert written(schedule.left_out) == "8:64 4:32"
    assert [schedule.phase(t).pattern.group for t in (0, 44, 45, 89, 90)] == [16, 16, 8, 8, 8]
    assert FlowSchedule("sdgf-geometric", NM(1, 8), 128, 100).left_out == ()


@pytest.mark.parametrize(
    ("kind", "decay", "betas"),
    [
        ("mdgf-linear", None, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("mdgf-linear", 2.0, [1.0, 0.5, 0.0, 0.0, 0.0]),
        ("mdgf-linear", 0.4, [1.0, 0.9, 0.8, 0.7, 0.0]),  # what is left is dropped where the tail begins
        ("mdgf-exp", 4.0, [1.0, math.exp(-1), math.exp(-2), math.exp(-3), 0.0]),
        ("sdgf-stepwise", None, [0.0] * 5),
        ("sdgf-geometric", None, [0.0] * 5),
        ("sr-ste", None, [0.0] * 5),
        ("ste", None, [0.0] * 5),
    ],
)
def test_beta_by_hand(kind: str, decay: float | None, betas: list[float]) -> None:
    schedule = FlowSchedule(kind, NM(1, 4), 8, 5, tail=0.2, decay=decay)  # steps 0..3 flow, step 4 is frozen
    assert [schedule.phase(t).beta for t in range(5)] == pytest.approx(betas)
    assert [schedule.phase(t).frozen for t in range(6)] == [False] * 4 + [True] * 2


def test_frames_share_the_steps_before_the_tail() -> None:
    schedule = FlowSchedule("sdgf-stepwise", NM(1, 8), 16, 10, tail=0.2)
    keeps = [schedule.phase(t).pattern.keep for t in range(12)]
    assert keeps == [7, 7, 4, 4, 2, 2, 1, 1, 1, 1, 1, 1]
    assert schedule.freeze == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [0.0, 0.3, 1.0])
def test_every_kind_ends_at_the_target(kind: str, tail: float) -> None:
    schedule = FlowSchedule(kind, NM(2, 8), 16, 7, tail=tail)
    assert schedule.phase(7) == schedule.phase(1000) == Phase(NM(2, 8), 0.0, True)
    assert schedule.phase(0).frozen == (tail == 1.0)
    frozen = [schedule.phase(t).frozen for t in range(8)]
    assert frozen == sorted(frozen)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "mdgf"}, "schedule 'mdgf' is unknown; allowed: mdgf-exp"),
        ({"steps": 0}, "at least one step, got 0"),
        ({"tail": 1.5}, r"tail must be in \[0, 1\], got 1.5"),
        ({"tail": float("nan")}, "tail must be"),
        ({"cols": 10}, "10 inputs are not a multiple of 4"),
        ({"kind": "ste", "decay": 1.0}, "schedule ste has no decay"),
        ({"decay": 0.0}, "decay must be positive, got 0"),
        ({"decay": float("inf")}, "decay must be positive, got inf"),
    ],
)
def test_what_cannot_be_is_refused(change: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        FlowSchedule(**{"kind": "mdgf-exp", "target": NM(1, 4), "cols": 8, "steps": 10} | change)
