"""From the options of a command to a recipe; None means "not given" everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from . import trained as t

if TYPE_CHECKING:
    from ..compress.recipe import Machine, Recipe

TEXT = ("calibration", "nsamples", "seqlen")  # options that pruning and an activation policy share


def recipe_from_options(
    prune: dict[str, Any],
    training: dict[str, Any],
    evaluation: dict[str, Any],
    export: dict[str, Any],
    general: dict[str, Any],
    *,
    no_eval: bool,
    activation: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of the options, where None means "not given". RecipeError when they contradict each other.

    An activation policy is made after pruning, or in place of it: then options of pruning alone are mistakes.
    """
    from ..compress.recipe import ActivationStage, build

    stages: list[Any] = []
    skipping = given(activation or {})
    text = {name: value for name, value in given(prune).items() if name in TEXT}
    others = {name: value for name, value in given(prune).items() if name not in TEXT}
    prunes = not skipping or bool(others.keys() & {"method", "sparsity", "pattern"})
    if prunes:
        measures = others.get("method") not in t.trained_methods() or not skipping
        seen = text if measures else {name: value for name, value in text.items() if name == "seqlen"}
        stages.append(_first_stage({**others, **seen}, given(training)))
    elif others or given(training):
        wrong = spelled({**others, **given(training)})
        raise RecipeError(
            f"{wrong} belongs to pruning, and {spelled(as_activation(skipping))} alone prunes nothing",
            hint="add --sparsity, --pattern or --method to prune as well",
        )
    if skipping:
        stages.append(build(ActivationStage, **skipping, **text))
    return finished(stages, evaluation, export, general, no_eval=no_eval)


def finished(
    stages: list[Any], evaluation: dict[str, Any], export: dict[str, Any], general: dict[str, Any], *, no_eval: bool
) -> Recipe:
    """`stages`, then the evaluation unless it is not wanted, then the export. RecipeError for options of both kinds."""
    from ..compress.recipe import EvaluateStage, ExportStage, Recipe, build

    if not no_eval:
        stages = [*stages, build(EvaluateStage, **given(evaluation))]
    elif given(evaluation):
        raise RecipeError(f"--no-eval contradicts {spelled(as_options(evaluation))}", hint="give one of them")
    return build(Recipe, stages=[*stages, build(ExportStage, **given(export))], **given(general))


def _first_stage(prune: dict[str, Any], training: dict[str, Any]) -> Any:
    """What --method names: a one-shot method of the prune stage, or a stage that trains."""
    from ..compress.recipe import PruneStage, build

    if "method" in prune:
        t.check_known(prune["method"])
    if prune.get("method") not in t.trained_methods():
        t.refuse_training_options(training, spelled(training))
        return build(PruneStage, **prune)
    fields = {
        name: value for name, value in {**prune, **training}.items() if name not in ("method", "pattern_for", "set")
    }
    return t.trained_stage(prune["method"], fields, training.get("pattern_for"), training.get("set"))


def recipe_from_file(file: Path, options: dict[str, Any]) -> Recipe:
    """The recipe of a YAML file. RecipeError when any of `options` was given too: the file holds all of it."""
    from ..compress.recipe import load_recipe

    if given(options):
        raise RecipeError(
            f"--recipe cannot be combined with {spelled(options)}", hint="write the values into the recipe file"
        )
    return load_recipe(file)


def build_machine(device: str | None, dtype: str | None, max_memory: str | None) -> Machine:
    """Machine options; RecipeError for a value that is not allowed."""
    from ..compress.recipe import Machine, build

    return build(Machine, **given({"device": device, "dtype": dtype, "max_memory": max_memory}))


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def as_options(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Fields of the evaluate stage under the names of their options."""
    return {"eval" if name == "data" else f"eval_{name}": value for name, value in evaluation.items()}


def as_activation(activation: dict[str, Any]) -> dict[str, Any]:
    """Fields of the activation stage under the names of their options."""
    own = {"method": "activation", "sparsity": "activation_sparsity", "guide": "activation_guide"}
    return {own.get(name, name): value for name, value in activation.items()}


def spelled(options: dict[str, Any]) -> str:
    """The options that were given, as they are written on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in given(options))
