"""Options of `compress` for an activation policy: fields of its stage, under the names of the command line."""

from __future__ import annotations

from typing import Any

from ..errors import RecipeError
from . import trained as t
from .recipes import as_activation, given, spelled

GOALS = ("sparsity", "target_ppl_increase", "target_speedup")


def activation_fields(
    options: dict[str, Any], method: str | None, more: list[str] | None
) -> tuple[dict[str, Any], list[str] | None]:
    """(fields of the stage, what is left of --set). `options`: what was given by options of their own.

    --set is for the activation stage unless `method` (--method) trains. RecipeError for two goals.
    """
    goals = {name: value for name, value in given(options).items() if name in GOALS}
    if len(goals) > 1:
        raise RecipeError(
            f"{spelled(as_activation(goals))} contradict each other", hint="give one: each decides how much is skipped"
        )
    if not given(options) or not more or method in t.trained_methods():
        return options, more
    return t.with_fields(given(options), more), None
