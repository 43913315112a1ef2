"""What candidates of a soup differ in: one field, by hand."""

from __future__ import annotations

import pytest

from gossamer.errors import RecipeError
from gossamer.pruning.factors import FACTORS, Factor, candidates, get_factor, register, values_of

BASE = {"seed": 4, "weight_decay": 0.0, "steps": 100, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("name", "field", "expected"),
    [
        ("seed", "seed", [4, 5, 6, 7]),
        ("weight-decay", "weight_decay", [0.0, 0.01, 0.02, 0.04]),
        ("length", "steps", [100, 150, 67, 225]),
        ("learning-rate", "learning_rate", [1e-3, 2e-3, 5e-4, 4e-3]),
    ],
)
def test_default_values_by_hand_and_nothing_else_varies(name: str, field: str, expected: list) -> None:
    found = candidates(BASE, name, 4)
    assert [config[field] for config in found] == pytest.approx(expected)
    for config in found:
        assert {**config, field: None} == {**BASE, field: None}
    assert found[0] == BASE


def test_given_values() -> None:
    assert values_of("learning-rate", 1.0, 2, ["1e-3", "0.5"]) == [1e-3, 0.5]
    assert values_of("seed", 0, 2, [9, 3]) == [9, 3]
    with pytest.raises(RecipeError, match="2 values of seed for 3 candidates"):
        values_of("seed", 0, 3, ["1", "2"])
    with pytest.raises(RecipeError, match="must differ in seed, got 1, 1"):
        values_of("seed", 0, 2, ["1", "1"])
    for name, value in (
        ("seed", "-1"),
        ("learning-rate", "0"),
        ("weight-decay", "nan"),
        ("length", "0"),
        ("seed", "x"),
    ):
        with pytest.raises(RecipeError, match=f"is not a value of {name}"):
            values_of(name, 1, 2, ["1", value])


def test_unknown_factor_and_missing_field() -> None:
    with pytest.raises(RecipeError, match="did you mean learning-rate"):
        get_factor("learning_rat")
    with pytest.raises(RecipeError, match="no seed"):
        candidates({"steps": 3}, "seed", 2)


def test_another_factor_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.pruning.factors.FACTORS", dict(FACTORS))
    register(Factor("momentum", "momentum", "0.9, 0.8, ...", lambda base, index: base - index / 10, float))
    found = candidates({"momentum": 0.9, "seed": 1}, "momentum", 2)
    assert found == [{"momentum": 0.9, "seed": 1}, {"momentum": pytest.approx(0.8), "seed": 1}]
    with pytest.raises(ValueError, match="registered already"):
        register(FACTORS["seed"])
