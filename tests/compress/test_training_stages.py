"""What every stage that trains refuses in a recipe."""

from __future__ import annotations

import pytest

from gossamer.compress.recipe import (
    FinetuneStage,
    GradualStage,
    ImpStage,
    NmFlowStage,
    RandomStage,
    SoupStage,
    build,
)
from gossamer.errors import RecipeError

KINDS = [FinetuneStage, GradualStage, ImpStage, NmFlowStage, RandomStage, SoupStage]
FIELDS = [(kind, "temperature") for kind in KINDS] + [
    *((ImpStage, name) for name in ("weight_decay", "momentum", "warmup", "clip", "hidden", "share", "heldout")),
    (FinetuneStage, "alpha"),
    (GradualStage, "end"),
    (NmFlowStage, "tail"),
    (SoupStage, "margin"),
]


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_numbers_are_finite(kind, field, value):
    with pytest.raises(RecipeError, match=f"{field} must be a finite number"):
        build(kind, **{field: float(value)})
    with pytest.raises(RecipeError, match=f"{field} must be a finite number"):
        build(kind, **{field: value})  # as --set gives it


@pytest.mark.parametrize("kind", KINDS)
def test_allr_is_for_phases(kind):
    if kind in (ImpStage, SoupStage):
        assert build(kind, schedule="allr").schedule == "allr"
        return
    with pytest.raises(RecipeError, match="allr starts from the damage of a pruning phase") as error:
        build(kind, schedule="allr")
    assert error.value.hint == "use llr"
