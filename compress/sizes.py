"""Sizes as people write them."""

from __future__ import annotations

import re

from ..errors import RecipeError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "500MB" or "1234". RecipeError for anything else or for zero."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise RecipeError(f"{text!r} is not a size", hint="write a number and a unit, such as 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])
