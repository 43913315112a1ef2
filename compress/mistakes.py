"""What is wrong with a recipe, in the user's words: pydantic's list of complaints as one line and a hint."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import GossamerError

FALLBACK = "the command's `--help` says what is allowed"
Kinds = Mapping[str, type[BaseModel]]


class Mistake(ValueError):
    """What a validator raises: pydantic collects ValueErrors only, and keeps the object with its hint."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def checked(function: Callable[[], Any]) -> None:
    """Call `function` inside a validator: a GossamerError becomes a Mistake with the same message and hint."""
    try:
        function()
    except GossamerError as error:
        raise Mistake(error.message, hint=error.hint) from error


def explain(error: ValidationError, kind: type[BaseModel], stages: Kinds) -> tuple[str, str]:
    """(message, hint) for all complaints. `stages`: stage name -> its class."""
    items: list[Any] = list(error.errors())
    if any(item["type"] != "too_short" for item in items):
        items = [item for item in items if item["type"] != "too_short"]  # entries with mistakes are not counted
    messages, hints = [], []
    for item in items:
        message, hint = _one(item, kind, stages)
        messages.append(message)
        hints.append(hint)
    return "; ".join(messages), "; ".join(dict.fromkeys(hint for hint in hints if hint)) or FALLBACK


def _one(item: Any, kind: type[BaseModel], stages: Kinds) -> tuple[str, str | None]:
    path = item["loc"]
    where = ".".join(str(part) for part in path if part not in stages)
    given = item["input"]
    if item["type"] == "value_error":
        cause = item["ctx"]["error"]
        message = str(cause)
        return (f"{where}: {message}" if where and where not in message else message), getattr(cause, "hint", None)
    if item["type"] == "extra_forbidden":
        return _unknown_field(where, path, kind, stages)
    if item["type"] == "union_tag_invalid":
        return f"{where}: stage {item['ctx']['tag']!r} is unknown; allowed: {', '.join(stages)}", None
    if item["type"] == "union_tag_not_found":
        return f"{where} does not say which stage it is", f"start it with `stage:` and one of {', '.join(stages)}"
    if item["type"] == "tuple_type":
        return f"{where} must be a list, got {_short(given)}", "a list in YAML is `[a, b]`, or lines that start with -"
    if item["type"] == "too_short":
        return f"{where} needs at least 1 entry", "a minimal recipe is `stages: [{stage: prune, sparsity: 0.5}]`"
    message = item["msg"].replace("Input should be", "must be", 1)
    return f"{where} {message}, got {_short(given)}", None


def _unknown_field(where: str, path: tuple[Any, ...], kind: type[BaseModel], stages: Kinds) -> tuple[str, str]:
    owner = stages[path[-2]] if len(path) > 1 and path[-2] in stages else kind
    fields = list(owner.model_fields)
    near = difflib.get_close_matches(str(path[-1]), fields, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"{where} is no field of a recipe{guess}", f"fields there: {', '.join(fields)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
