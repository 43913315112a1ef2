"""The recipe: one object from flags and from YAML, every mistake a one-line RecipeError."""

import pytest

from gossamer.compress.recipe import (
    EvaluateStage,
    ExportStage,
    Machine,
    PruneStage,
    Recipe,
    build,
    load_recipe,
)
from gossamer.compress.sizes import parse_bytes
from gossamer.errors import RecipeError


def test_yaml_and_objects_build_the_same_recipe(tmp_path):
    recipe = Recipe(
        stages=(
            PruneStage(method="wanda", sparsity=0.3, include=("mlp",)),
            PruneStage(pattern="2:4", calibration="text.txt"),
            EvaluateStage(data="held.txt", windows=4),
            ExportStage(format="both"),
        ),
        seed=3,
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "r.yaml")
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert again.sha256() != recipe.model_copy(update={"seed": 4}).sha256()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages: []", "at least 1"),
        ("nothing: 1", "no list of stages"),
        ("stages: [{stage: prune, sparsity: 1.5}]", "sparsity must be in"),
        ("stages: [{stage: prune, sparsity: 1}]", "sparsity must be in"),
        ("stages: [{stage: prune, sparsity: 0.5, pattern: '2:4'}]", "not both"),
        ("stages: [{stage: prune, include: ['(']}]", "regular expression"),
        ("stages: [{stage: evaluate}]", "at least one stage that changes"),
        ("stages: [{stage: export}, {stage: prune}]", "at the end"),
        ("stages: [{stage: prune, bananas: 1}]", "bananas"),
        ("stages: [{stage: fry}]", "fry"),
        ("stages: [{stage: prune, nsamples: 0}]", "nsamples"),
        ("stages: [", "not valid YAML"),
        ("stages: [{stage: prune, allocation: owl, pattern: '2:4'}]", "owl"),
    ],
)
def test_mistakes_are_recipe_errors(tmp_path, text, expected):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected) as caught:
        load_recipe(path)
    assert "\n" not in caught.value.message


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_defaults():
    stage = PruneStage()
    assert stage.pattern_text == "0.5"
    assert stage.method == "gossamer"
    assert PruneStage(pattern="2:4").pattern_text == "2:4"
    assert PruneStage(pattern="block:4x8", sparsity=0.7).pattern_text == "block:4x8:0.7"
    assert Recipe(stages=(stage,)).export.format == "sparse"


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("500MB", 5 * 10**8), ("1.5 kib", 1536), ("77", 77), ("2b", 2)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1GB", "0", "GiB"])
def test_bad_sizes(text):
    with pytest.raises(RecipeError):
        parse_bytes(text)
    with pytest.raises(RecipeError):
        build(Machine, max_memory=text)
