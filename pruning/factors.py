"""What the candidates of a soup differ in: exactly one factor of the training configuration.

A factor turns the configuration that all share into the value that candidate i gets for one field. The table is open:
`register` adds a factor under a new name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError

DEFAULT_FACTOR = "seed"


@dataclass(frozen=True)
class Factor:
    """One factor.

    Attributes:
        name: its key in the table.
        field: the field of the training configuration that it sets.
        summary: one line for people.
        value: (base value, candidate index from 0) -> value; candidate 0 has the base value itself. When the user lists
            values, these are taken instead.
        parse: text -> value, for a list on the command line; ValueError for what is not allowed.
    """

    name: str
    field: str
    summary: str
    value: Callable[[Any, int], Any]
    parse: Callable[[str], Any]


def _around(step: float) -> Callable[[float, int], float]:
    """base, base * step, base / step, base * step^2, ..."""

    def value(base: float, index: int) -> float:
        power = (index + 1) // 2
        return base * step**power if index % 2 else base / step**power

    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError("must be above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must not be negative")
    return value


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError("must be in [0, 2^63)")
    return value


def _decay(base: float, index: int) -> float:
    """base, then 0.01, 0.02, 0.04, ... above it: a base of 0 has no multiples."""
    return base + (0.005 * 2**index if index else 0.0)


def _length(base: int, index: int) -> int:
    return max(1, round(_around(1.5)(base, index)))


FACTORS: dict[str, Factor] = {
    factor.name: factor
    for factor in (
        Factor("seed", "seed", "order of the batches and dropout: seed, seed + 1, ...", lambda b, i: b + i, _seed),
        Factor("weight-decay", "weight_decay", "the base, and 0.01, 0.02, 0.04, ... above it", _decay, _not_negative),
        Factor("length", "steps", "steps: the base, half as many more, a third fewer, ...", _length, _whole),
        Factor("learning-rate", "learning_rate", "peak: the base, twice and half of it, ...", _around(2.0), _positive),
    )
}  # fmt: skip


def register(factor: Factor) -> None:
    """Add a factor. ValueError for a name that is taken."""
    if factor.name in FACTORS:
        raise ValueError(f"the factor {factor.name!r} is registered already")
    FACTORS[factor.name] = factor


def get_factor(name: str) -> Factor:
    """RecipeError with all names and the nearest spelling, unless the factor exists."""
    if name not in FACTORS:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), FACTORS, n=1)
        raise RecipeError(
            f"factor {name!r} is unknown; allowed: {', '.join(FACTORS)}",
            hint=f"did you mean {near[0]}?" if near else "it is what the candidates of a soup differ in",
        )
    return FACTORS[name]


def values_of(name: str, base: Any, count: int, values: Sequence[str | float] = ()) -> list[Any]:
    """The values of `count` candidates. RecipeError unless they are allowed, all different, and one for each."""
    factor = get_factor(name)
    if values and len(values) != count:
        raise RecipeError(
            f"{len(values)} values of {name} for {count} candidates", hint="give one value for each candidate"
        )
    found = []
    for index in range(count):
        try:
            found.append(factor.parse(str(values[index])) if values else factor.value(base, index))
        except ValueError as error:
            raise RecipeError(
                f"{values[index]!r} is not a value of {name}: {error}", hint=f"{name} is {factor.summary}"
            ) from error
    if len(set(found)) < count:
        shown = ", ".join(str(value) for value in found)
        longer = "train for more steps, or " if factor.field == "steps" else ""
        raise RecipeError(
            f"candidates must differ in {name}, got {shown}",
            hint=f"{longer}give --set factor_values=..., all different",
        )
    return found


def candidates(
    base: Mapping[str, Any], name: str, count: int, values: Sequence[str | float] = ()
) -> list[dict[str, Any]]:
    """`count` copies of the configuration `base` that differ in the field of factor `name` alone."""
    field = get_factor(name).field
    if field not in base:
        raise RecipeError(f"the training configuration has no {field}, which the factor {name} sets")
    return [{**base, field: value} for value in values_of(name, base[field], count, values)]
