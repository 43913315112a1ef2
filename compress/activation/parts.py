"""Finished work of a calibration: entries per block as safetensors files, figures in the journal of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ...activation_sparsity.base import CoreGuide, CoreNeurons, Policy
from ...activation_sparsity.method import Fitted
from ...activation_sparsity.store import from_tensors, to_tensors
from .. import distributed
from ..safefile import SafeFile
from ..stages.base import Context
from ..writer import output, write_file
from .apply import Reads

RECORD = "fitted"
EXTRA = "extra:"


class Parts(Protocol):
    """Where finished work is kept: in memory, or in the folder of a run with its journal."""

    def budgets(self) -> dict[str, float] | None:
        """Of a finished survey."""
        ...

    def keep_budgets(self, budgets: Mapping[str, float]) -> None:
        """The survey is finished."""
        ...

    def block(self, round_: int, index: int) -> tuple[Fitted, dict[str, int], dict[str, int]] | None:
        """A finished block with what was read of it, or None."""
        ...

    def keep_block(self, round_: int, index: int, fitted: Fitted, reads: Reads) -> None:
        """The block is finished."""
        ...


class InMemory:
    """Parts that are gone with the process."""

    def budgets(self) -> dict[str, float] | None:
        return None

    def keep_budgets(self, budgets: Mapping[str, float]) -> None:
        pass

    def block(self, round_: int, index: int) -> tuple[Fitted, dict[str, int], dict[str, int]] | None:
        return None

    def keep_block(self, round_: int, index: int, fitted: Fitted, reads: Reads) -> None:
        pass


class StoredParts:
    """Parts of one goal of a stage. `unit`: its prefix in the journal and its name in `folder`."""

    def __init__(self, context: Context, folder: Path, unit: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.context, self.folder, self.unit, self.shapes = context, folder, unit, shapes

    def budgets(self) -> dict[str, float] | None:
        """See `Parts`."""
        done = self.context.journal.done(f"{self.unit}/budgets")
        return None if done is None else dict(done["budgets"])

    def keep_budgets(self, budgets: Mapping[str, float]) -> None:
        """See `Parts`."""
        self.context.finish(f"{self.unit}/budgets", {"budgets": dict(budgets)})

    def block(self, round_: int, index: int) -> tuple[Fitted, dict[str, int], dict[str, int]] | None:
        """See `Parts`."""
        done = self.context.journal.done(self._name(round_, index))
        if done is None:
            return None
        return read_fitted(self._path(round_, index)), dict(done["read"]), dict(done["whole"])

    def keep_block(self, round_: int, index: int, fitted: Fitted, reads: Reads) -> None:
        """See `Parts`."""
        distributed.on_main(lambda: write_fitted(self._path(round_, index), fitted, self.shapes))
        self.context.finish(self._name(round_, index), {"read": reads.read, "whole": reads.whole})

    def _name(self, round_: int, index: int) -> str:
        return f"{self.unit}/round-{round_}/block-{index:05d}"

    def _path(self, round_: int, index: int) -> Path:
        return self.folder / f"{self.unit.rpartition('/')[2]}-{round_}-{index:05d}.safetensors"


def write_fitted(path: Path, fitted: Fitted, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The entries of one block as a file, whole or not at all."""
    neurons = any(isinstance(entry, CoreNeurons) for entry in fitted.mlps.values())
    guide = CoreGuide(1.0) if neurons else None  # stands in until the last block is done
    policy = Policy("", shapes, fitted.linears, fitted.mlps, guide=guide, facts=fitted.facts)
    tensors, record = to_tensors(policy)
    tensors |= {EXTRA + name: tensor.detach().cpu().contiguous() for name, tensor in fitted.extra.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, [output(name, tensor) for name, tensor in tensors.items()], {RECORD: json.dumps(record)})


def read_fitted(path: Path) -> Fitted:
    """What `write_fitted` wrote."""
    file = SafeFile(path)
    tensors = {name: file.read(name) for name in file.entries}
    extra: dict[str, Tensor] = {n[len(EXTRA) :]: tensors.pop(n) for n in list(tensors) if n.startswith(EXTRA)}
    policy = from_tensors(tensors, json.loads(file.metadata[RECORD]))
    return Fitted(policy.linears, policy.mlps, policy.facts, extra)
