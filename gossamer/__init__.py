"""Gossamer: make HuggingFace language models sparse, and make the sparsity pay."""

from __future__ import annotations

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Python started in the root of the checkout finds this folder before the installed package, and its sub-packages do not
# lie here: they are then taken from the installation.
__path__ = extend_path(__path__, __name__)

from . import _hook

if TYPE_CHECKING:
    from .compress.load import load
    from .finetune.sparse_lora import merging

__all__ = ["__version__", "load", "merging"]

_hook.install()


def __getattr__(name: str) -> Any:
    """These bring torch, transformers and peft along, so they are imported when they are asked for."""
    if name == "load":
        from .compress.load import load

        return load
    if name == "merging":
        from .finetune.sparse_lora import merging

        return merging
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
