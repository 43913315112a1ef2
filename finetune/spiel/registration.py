"""Makes the method known to peft, which has a closed list of methods and four open tables."""

from __future__ import annotations

import warnings
from typing import Any

import peft
from peft import mapping
from peft.utils.peft_types import PeftType

from .config import SPIEL, SpielConfig
from .model import SpielModel

TESTED_VERSIONS = ("0.21.2",)


def register() -> None:
    """Idempotent; a warning, and nothing done, where peft has a method of that name, or its tables are not as known."""
    if SPIEL in PeftType.__members__:
        _warn(f"peft {peft.__version__} has a method {SPIEL} of its own")
        return
    try:
        tables: Any = (
            (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, SpielConfig),
            (mapping.PEFT_TYPE_TO_TUNER_MAPPING, SpielModel),
            (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, SpielModel.prefix),
        )
    except AttributeError as error:
        _warn(f"peft {peft.__version__} is not as known: {error}; tested with {', '.join(TESTED_VERSIONS)}")
        return
    if any(prefix == SpielModel.prefix and name != SPIEL for name, prefix in tables[2][0].items()):
        _warn(f"another method has taken the prefix {SpielModel.prefix}")
        return
    for table, value in tables:
        table[SPIEL] = value


def _warn(what: str) -> None:
    warnings.warn(f"sparse fine-tuning is not available: {what}", stacklevel=2)
