"""Registers the sparse format with transformers, whichever of the two is imported first, and imports neither.

transformers looks quantizers up in a table and finds no plugins by itself. So `import gossamer` either registers at
once, when that table has been imported already, or waits: a finder at the head of `sys.meta_path` lets the ordinary
machinery import the table's module and registers right after it was executed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"
NAME = "gossamer"
_QUANTIZER = "gossamer.compress.quantizer"


def install() -> None:
    """Register now or when `transformers.quantizers.auto` is imported. Any number of calls are one."""
    if _is_complete(sys.modules.get(TABLE)):
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(TABLE, register))


def register() -> None:
    """Put our quantizer and its configuration into transformers' tables; a warning where they are not as known."""
    try:
        table = importlib.import_module(TABLE)
        ours = importlib.import_module(_QUANTIZER)
        if NAME not in table.AUTO_QUANTIZATION_CONFIG_MAPPING:
            table.register_quantization_config(NAME)(ours.GossamerConfig)
        if NAME not in table.AUTO_QUANTIZER_MAPPING:
            table.register_quantizer(NAME)(ours.GossamerHfQuantizer)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"sparse checkpoints cannot be loaded with this version of transformers: {error}; "
            "`gossamer convert --to dense` makes ordinary ones",
            stacklevel=2,
        )


class _AfterImport(MetaPathFinder):
    """Calls `action` once, after module `name` was executed; everything else is left to the other finders."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                self._wrap(spec)
                return spec
        return None

    def _wrap(self, spec: ModuleSpec) -> None:
        """The loader keeps its type and everything it can do; only this instance executes and then calls."""
        loader = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ == self._name and self in sys.meta_path:
                sys.meta_path.remove(self)
                self._action()

        loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]


def _is_complete(module: ModuleType | None) -> bool:
    """Imported, and not just being imported further up the stack."""
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)
