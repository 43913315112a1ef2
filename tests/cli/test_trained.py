"""`compress --method` with a stage that trains: its options, and what its hints tell people to type."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from gossamer.cli import failure
from gossamer.cli.main import app
from gossamer.cli.trained import trained_stage
from gossamer.compress.recipe import ImpStage, SoupStage
from gossamer.compress.stages.targets import phase_steps
from gossamer.errors import RecipeError
from gossamer.pruning.factors import values_of
from gossamer.pruning.soup import check_count, learn_weights


@pytest.mark.parametrize(("method", "kind"), [("imp", ImpStage), ("soup", SoupStage)])
def test_calibration_goes_to_stages_that_have_a_score(method, kind):
    built = trained_stage(method, {"calibration": "c.txt"}, None, ["score=wanda"])
    assert built == kind(score="wanda", calibration="c.txt")


@pytest.mark.parametrize("method", ["nm-flow", "gradual", "random"])
def test_calibration_is_refused_elsewhere(method):
    with pytest.raises(RecipeError, match=f"--calibration is for methods that measure; {method} trains"):
        trained_stage(method, {"calibration": "c.txt"}, None, None)


def test_a_value_may_hold_an_equals_sign():
    built = trained_stage(
        "nm-flow", {"data": "t.txt"}, ["self_attn=2:4", "a=b=dense"], ["teacher=runs/a=b", "loss=mix"]
    )
    assert built.teacher == "runs/a=b"
    assert built.patterns == {"self_attn": "2:4", "a=b": "dense"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["momentum=0.3"], "momentum 0.3 is given, and nothing uses it"),
        (["temperature=2"], "temperature 2 is given, and nothing uses it"),
        (["loss=distill", "share=0.2"], "share 0.2 is given, and nothing uses it"),
    ],
)
def test_a_field_that_nothing_looks_at_is_refused(more, said):
    with pytest.raises(RecipeError, match=said):
        trained_stage("gradual", {"data": "t.txt"}, None, more)
    assert (
        trained_stage(
            "gradual", {"data": "t.txt"}, None, [w for w in more if w != "loss=distill"] + ["optimizer=sgd", "loss=mix"]
        ).loss
        == "mix"
    )


def test_hints_name_options_that_exist():
    text = CliRunner().invoke(app, ["compress", "--help"], env={"COLUMNS": "200"}).output
    options, fields = set(re.findall(r"--[a-z-]+", text)), {*SoupStage.model_fields}
    for mistake in (
        lambda: phase_steps(2, 3),
        lambda: values_of("length", 1, 3),
        lambda: check_count(2, 3),
        lambda: learn_weights(2, lambda weights: (float("nan"), [0.0, 0.0])),
    ):
        with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is, its hint counts
            mistake()
        hint = error.value.hint
        assert set(re.findall(r"--[a-z-]+", hint)) <= options, hint
        assert "--set" in hint
        assert set(re.findall(r"--set (\w+)=", hint)) <= fields, hint


def test_ctrl_c_while_training_goes_on_from_a_checkpoint():
    assert "last checkpoint" in failure._how_to_go_on(["compress", "M", "-o", "O", "--method", "imp"])
    assert "last finished block" in failure._how_to_go_on(["compress", "M", "-o", "O"])
    assert "last checkpoint" in failure._how_to_go_on(["finetune", "M", "-o", "O"])
    assert failure._how_to_go_on(["soup", "A", "B"]) is None
