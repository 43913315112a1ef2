"""Fields of the activation stage: what is allowed, where they arrive, and what a run says of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from activation_cases import core_policy
from families import save_family
from test_activation_speed import calibration_of
from tiny import report

from gossamer.activation_sparsity.coreinfer import CoreInfer
from gossamer.activation_sparsity.sequences import Sequences
from gossamer.cli.activation import activation_fields
from gossamer.cli.recipes import recipe_from_options
from gossamer.compress.activation.file import read_policy
from gossamer.compress.activation.methods import make_method
from gossamer.compress.format import METADATA_KEY
from gossamer.compress.recipe import build
from gossamer.compress.run import compress
from gossamer.compress.stage_recipes.activation import ActivationStage
from gossamer.compress.stages.activation import NOT_SIMULATED, _Run
from gossamer.errors import RecipeError


def stage(**fields):
    return build(ActivationStage, **fields)


def test_fields_reach_their_method():
    method = make_method(
        stage(method="coreinfer", alpha="0.3", keep=0.5, drift=0.7, layers="1-2", refresh=8), 3, blocks=4
    )
    assert (method.alpha, method.keep, method.drift, method.layers, method.refresh) == (0.3, 0.5, 0.7, (1, 2), 8)
    found = make_method(stage(method="rsparse", rho=0.8, population=6, generations=2), 3, blocks=4)
    assert (found.rho, found.population, found.generations, found.seed) == (0.8, 6, 2, 3)
    plain = make_method(stage(method="coreinfer"), 0, blocks=4)
    assert (plain.alpha, plain.keep, plain.layers) == (0.4, None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "auto", "alpha": 0.3}, "alpha belongs to coreinfer, the method is auto"),
        ({"method": "auto", "drift": 0}, "drift belongs to coreinfer"),
        (
            {"method": "coreinfer", "search": False},
            "search belongs to auto, threshold, wina, rsparse, the method",
        ),
        ({"method": "coreinfer", "rho": 0.3}, "rho belongs to rsparse"),
        ({"method": "coreinfer", "keep": 0.3, "sparsity": 0.2}, "give one of sparsity and keep"),
        ({"method": "coreinfer", "keep": 1.5}, "keep"),
        ({"method": "coreinfer", "layers": "5-2"}, "layers '5-2' is no range"),
        ({"method": "coreinfer", "layers": "some"}, "layers 'some' is no range"),
        ({"method": "coreinfer", "refresh": 1}, "all neurons of every token"),
        ({"method": "rsparse", "search": False, "population": 6}, "search is off"),
        ({"target_ppl_increase": "1"}, "is an increase by 100%"),
        ({"target_ppl_increase": "0.6"}, "is an increase by 60%"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(RecipeError, match=message):
        stage(**fields)


def test_a_percentage_is_not_a_share():
    with pytest.raises(RecipeError) as caught:
        stage(target_ppl_increase="1")
    assert caught.value.hint.startswith("1%?")
    assert stage(target_ppl_increase="1%").target_ppl_increase == pytest.approx(0.01)
    assert stage(target_ppl_increase="60%").target_ppl_increase == pytest.approx(0.6)
    assert stage(target_ppl_increase=0.6).target_ppl_increase == pytest.approx(0.6)  # as the recipe was written
    assert stage(target_ppl_increase="0.05").target_ppl_increase == pytest.approx(0.05)


def test_the_command_names_its_own_options():
    with pytest.raises(RecipeError, match=r"--activation-sparsity, --target-speedup contradict"):
        activation_fields({"method": "auto", "sparsity": 0.5, "target_speedup": 2.0}, None, None)


def test_set_is_for_the_policy_unless_a_method_trains():
    options = {"method": "coreinfer", "sparsity": None}
    fields, left = activation_fields(options, None, ["alpha=0.3", "layers=1-2"])
    assert left is None
    built = recipe_from_options({}, {"set": left}, {}, {}, {}, no_eval=True, activation=fields)
    assert (built.stages[0].alpha, built.stages[0].layers) == (0.3, (1, 2))
    assert activation_fields(options, "nm-flow", ["batch=16"]) == (options, ["batch=16"])
    assert activation_fields({"method": None}, None, ["batch=16"]) == ({"method": None}, ["batch=16"])


@pytest.mark.parametrize("refresh", [2, 3, 4, 10, 16])
def test_the_watched_share_is_that_of_sequences(refresh):
    state = Sequences(core_policy("llama", refresh=refresh), 1)
    assert CoreInfer(refresh=refresh).watched == sum(state.step() for _ in range(refresh)) / refresh


def made(tiny: Path, out: Path, **fields):
    texts = {"calibration": str(tiny / "calibration.txt"), "nsamples": 4, "seqlen": 32}
    notes: list[str] = []
    recipe = recipe_from_options({}, {}, {}, {}, {}, no_eval=True, activation={**fields, **texts})
    compress(tiny, out, recipe, progress=_Notes(notes))
    return (
        report(out)["stages"][0],
        read_policy(out, json.loads((out / "config.json").read_text())[METADATA_KEY]["activation"]),
        notes,
    )


class _Notes:
    """Progress that keeps notes."""

    def __init__(self, notes: list[str]) -> None:
        self.note = notes.append

    def __getattr__(self, name: str):
        return lambda *_, **__: None


def test_a_refresh_is_in_the_goal_and_said(tiny: Path, tmp_path: Path) -> None:
    found, policy, notes = made(tiny, tmp_path / "a", method="coreinfer", sparsity=0.2, refresh=4)
    assert found["sparsity"] == pytest.approx(0.2, abs=0.01)
    assert found["watched"] == 0.25
    assert "without refresh" in found["note"]
    plain, other, notes = made(tiny, tmp_path / "b", method="coreinfer", sparsity=0.2)
    assert "watched" not in plain
    assert notes == []  # nothing is evaluated
    name = next(iter(policy.mlps))
    assert policy.mlps[name].keep < other.mlps[name].keep
    with pytest.raises(RecipeError, match="25% of the tokens compute all neurons: coreinfer can skip at most"):
        made(tiny, tmp_path / "c", method="coreinfer", sparsity=0.6, refresh=4)


def test_the_note_is_said_where_something_is_evaluated():
    notes: list[str] = []
    run = _Run.__new__(_Run)
    run.context = SimpleNamespace(
        progress=_Notes(notes), plan=SimpleNamespace(stages=[SimpleNamespace(stage=SimpleNamespace(stage="evaluate"))])
    )
    run._tell({"method": "coreinfer", "sparsity": 0.2, "note": NOT_SIMULATED})
    run._tell({"method": "coreinfer", "sparsity": 0.2})
    assert notes == [NOT_SIMULATED]


def test_keep_and_layers(tiny: Path, tmp_path: Path) -> None:
    _, policy, _ = made(tiny, tmp_path / "a", method="coreinfer", keep=0.25, layers="1-2", alpha=0.3, drift=0.9)
    assert list(policy.mlps) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert all(entry.keep == round(0.25 * entry.parts.neurons) for entry in policy.mlps.values())
    assert (policy.guide.alpha, policy.guide.drift) == (0.3, 0.9)
    with pytest.raises(RecipeError, match="layers ends at block 3, and the last of this model is 2"):
        made(tiny, tmp_path / "b", method="coreinfer", layers="0-3")


def test_layers_reach_the_goal_by_themselves(tmp_path: Path) -> None:
    _, calibration = calibration_of(save_family("llama", tmp_path / "m"), tmp_path)
    method = CoreInfer(layers=(0, 1), blocks=3)
    assert method.reachable(calibration.extent) == pytest.approx(2 / 3 * CoreInfer().reachable(calibration.extent))
