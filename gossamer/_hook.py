"""Registers the sparse format with transformers and sparse deltas with peft, in any order, and imports neither.

Both look names up in a table and find no plugins by themselves. So `import gossamer` either registers at once, when
that table has been imported already, or waits: a finder at the head of `sys.meta_path` lets the ordinary machinery
import the table's module and registers right after it was executed.
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
PEFT = "peft"
_QUANTIZER = "gossamer.compress.quantizer"
_TUNERS = ("gossamer.finetune.spiel.registration", "gossamer.finetune.sparse_lora")


def install() -> None:
    """Register now or when `transformers.quantizers.auto` and `peft` are imported. Any number of calls are one."""
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, _AfterImport)}
    for name, action in ((TABLE, register), (PEFT, register_tuner)):
        if _is_complete(sys.modules.get(name)):
            action()
        elif name not in waiting:
            sys.meta_path.insert(0, _AfterImport(name, action))


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


def register_tuner() -> None:
    """Sparse deltas into peft's tables, and LoRA onto sparse layers; a warning where peft is not as known."""
    try:
        for name in _TUNERS:
            importlib.import_module(name).register()
    except (ImportError, AttributeError) as error:
        warnings.warn(f"sparse fine-tuning is not available with this version of peft: {error}", stacklevel=2)


class _AfterImport(MetaPathFinder):
    """Calls `action` once, after module `name` was executed; everything else is left to the other finders."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
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
            if module.__name__ == self.name and self in sys.meta_path:
                sys.meta_path.remove(self)
                self._action()

        loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]


def _is_complete(module: ModuleType | None) -> bool:
    """Imported, and not just being imported further up the stack."""
    spec = getattr(module, "__spec__", None)
    return module is not None and not getattr(spec, "_initializing", False)
