"""`compress --method NAME` where NAME is a stage that trains: its options, and the stage that they make."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Optional

import typer

from ..errors import RecipeError
from . import options as o

Data = Annotated[
    Optional[str],
    typer.Option(
        metavar="DATA",
        help="Text or instructions to train on; a tenth is held out. \\[default: c4]",
        rich_help_panel=o.TRAINING,
        show_default=False,
    ),
]
Tokens = Annotated[
    Optional[int],
    typer.Option(
        metavar="N", help="Tokens to train on. \\[default: 1000000]", rich_help_panel=o.TRAINING, show_default=False
    ),
]
Steps = Annotated[
    Optional[int],
    typer.Option(
        metavar="N", help="Optimizer steps, instead of tokens.", rich_help_panel=o.TRAINING, show_default=False
    ),
]
LearningRate = Annotated[
    Optional[float],
    typer.Option(
        metavar="RATE", help="The highest one. \\[default: 0.001]", rich_help_panel=o.TRAINING, show_default=False
    ),
]
PatternFor = Annotated[
    Optional[list[str]],
    typer.Option(
        metavar="REGEX=N:M",
        help='nm-flow: another pattern for matching matrices, or "dense"; repeatable, the first match counts.',
        rich_help_panel=o.TRAINING,
        show_default=False,
    ),
]
Fields = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any other field of the stage, such as batch=16 or flow=sr-ste; repeatable.",
        rich_help_panel=o.TRAINING,
        show_default=False,
    ),
]


def trained_methods() -> dict[str, str]:
    """Name -> one line, of every stage that `--method` can name beside the one-shot methods."""
    from ..compress.stages.registry import TRAINED

    return TRAINED


def trained_stage(method: str, fields: dict[str, Any], patterns: list[str] | None, more: list[str] | None) -> Any:
    """The stage of a method that trains. `fields`: what was given by options of their own; `more`: from --set.

    RecipeError for a field that the stage does not have, or that was given twice.
    """
    from ..compress.recipe import STAGES, build

    if "calibration" in fields and "calibration" not in STAGES[method].model_fields:
        raise RecipeError(
            f"--calibration is for methods that measure; {method} trains", hint="give its text with --data"
        )
    found = dict(fields)
    if patterns:
        found["patterns"] = dict(_pair("--pattern-for", text) for text in patterns)
    return build(STAGES[method], **with_fields(found, more))


def with_fields(found: dict[str, Any], more: list[str] | None) -> dict[str, Any]:
    """`found` (options that were given) and what --set adds; "none" is no value. RecipeError for one given twice."""
    result = dict(found)
    for name, value in (_pair("--set", text, first=True) for text in more or ()):
        name = name.replace("-", "_")
        if name in result:
            raise RecipeError(f"{name} is given twice", hint=f"leave out --set {name}=...")
        result[name] = None if value == "none" else value
    return result


def check_known(method: str) -> None:
    """RecipeError with all names and the nearest spelling, unless `--method` can name it."""
    from ..pruning.registry import method_names

    names = [*method_names(), *trained_methods()]
    if method not in names:
        near = difflib.get_close_matches(method.lower(), names, n=1)
        raise RecipeError(
            f"method {method!r} is unknown; allowed: {', '.join(names)}",
            hint=f"did you mean {near[0]}?" if near else "gossamer methods describes them",
        )


def _pair(option: str, text: str, *, first: bool = False) -> tuple[str, str]:
    """NAME, VALUE. The last = separates, or the first: a regular expression may hold one, and so may a path."""
    name, sign, value = text.partition("=") if first else text.rpartition("=")
    if not sign or not name:
        raise RecipeError(f"{option} {text!r} is not understood", hint=f"write {option} NAME=VALUE")
    return name.strip(), value.strip()


def refuse_training_options(options: dict[str, Any], spelled: str) -> None:
    """RecipeError when a one-shot method is given options of training."""
    if options:
        raise RecipeError(
            f"{spelled} belongs to methods that train: {', '.join(trained_methods())}",
            hint="choose one of them with --method, or leave the option out",
        )
