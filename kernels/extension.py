"""The compiled module, or None: then everything runs in plain torch, and the user is told once why."""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

VARIABLE = "GOSSAMER_DISABLE_EXTENSION"
INTERFACE = 13  # must equal kInterface in csrc/module.cpp


@cache
def compiled() -> ModuleType | None:
    """`gossamer.kernels._C`, loaded at the first call. None when GOSSAMER_DISABLE_EXTENSION is set (and not "0").

    Warns once (RuntimeWarning) when the module was not built, does not load, or belongs to another version.
    """
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        return None
    try:
        # torch comes first, so that both use one OpenMP runtime.
        import torch  # noqa: F401

        from . import _C  # type: ignore[attr-defined]
    except ImportError as error:
        _warn(f"the compiled kernels cannot be loaded ({error})")
        return None
    found = getattr(_C, "interface", 0)
    if found != INTERFACE:
        _warn(f"the compiled kernels have interface {found}, this version needs {INTERFACE}")
        return None
    return _C


def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}; plain torch is used, which is slower. Reinstall Gossamer with a C++ compiler to get them.",
        RuntimeWarning,
        stacklevel=3,
    )
