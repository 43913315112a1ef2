"""The table of one-shot methods. Import-free: naming a method costs nothing, `get_method` imports its file.

Other packages add methods through the entry-point group `gossamer.pruning` (name = "module:Class"); the built-in names
cannot be replaced.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from ..errors import RecipeError

if TYPE_CHECKING:
    from .base import Method

DEFAULT_METHOD = "gossamer"
ENTRY_POINT_GROUP = "gossamer.pruning"

METHODS: dict[str, str] = {
    "gossamer": "gossamer.pruning.gossamer:Gossamer",
    "magnitude": "gossamer.pruning.magnitude:Magnitude",
    "ria": "gossamer.pruning.ria:RIA",
    "sparsegpt": "gossamer.pruning.sparsegpt:SparseGPT",
    "wanda": "gossamer.pruning.wanda:Wanda",
}

SUMMARIES: dict[str, str] = {
    "gossamer": "our own: the mask refined by exact swaps, the kept weights solved anew, checked on held-out tokens",
    "magnitude": "smallest absolute weight; needs no calibration text (Han et al. 2015)",
    "ria": "weight relative to its row and column, times the root of the input norm (Zhang et al. 2024)",
    "sparsegpt": "column by column with error compensation on the Gram matrix (Frantar and Alistarh 2023)",
    "wanda": "absolute weight times input norm, compared per output row (Sun et al. 2024)",
}


def method_names() -> list[str]:
    """All names, built-in and from other packages, sorted."""
    return sorted({*METHODS, *_external()})


def summary(name: str) -> str:
    """One line about a method."""
    if name in SUMMARIES:
        return SUMMARIES[name]
    point = _external().get(name)
    return "" if point is None else f"from {point.value.partition(':')[0]}"


def check_method(name: str) -> None:
    """RecipeError with all names and the nearest spelling, unless the method exists. Imports nothing heavy."""
    names = method_names()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        raise RecipeError(
            f"method {name!r} is unknown; allowed: {', '.join(names)}",
            hint=f"did you mean {near[0]}?" if near else "gossamer methods describes them",
        )


def get_method(name: str) -> Method:
    """An instance of the named method. RecipeError for an unknown name."""
    check_method(name)
    if name not in METHODS:
        return _external()[name].load()()
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


@cache
def _external() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in METHODS}
