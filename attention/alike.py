"""Whether a forward of transformers is one that we know to the letter."""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any


def alike(one: Any, other: Any) -> bool:
    """Whether two functions are the same code, wherever it stands."""
    first, second = (getattr(inspect.unwrap(function), "__code__", None) for function in (one, other))
    return first is not None and second is not None and _same_code(first, second)


def _same_code(one: CodeType, other: CodeType) -> bool:
    plain = [[c for c in code.co_consts if not isinstance(c, (CodeType, str))] for code in (one, other)]
    return (
        one.co_code == other.co_code
        and one.co_names == other.co_names
        and one.co_varnames == other.co_varnames
        and plain[0] == plain[1]
    )
