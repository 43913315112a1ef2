"""Where tensors come from: a checkpoint folder in any of its forms, or one with finished parts laid over it.

Nothing is mapped and nothing is kept: every read returns a dense CPU tensor of its own, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..errors import CheckpointError
from .format import MatrixRecord, SourceMask
from .modelfolder import WeightFiles, find_weights, read_config, resolve_folder
from .safefile import SafeFile
from .table import TensorMeta, TensorTable, file_digest, natural_key, open_files

__all__ = ["FolderSource", "OverlaySource", "StoredSource", "TensorMeta", "TensorSource", "open_source"]


class TensorSource(Protocol):
    """Dense tensors by checkpoint key, with explicit masks where there are any."""

    def keys(self) -> list[str]:
        """Checkpoint keys in natural order."""
        ...

    def meta(self, key: str) -> TensorMeta:
        """dtype and shape, from headers alone."""
        ...

    def read(self, key: str) -> Tensor:
        """The dense tensor on the CPU; a packed matrix is expanded."""
        ...

    def mask(self, key: str) -> SourceMask | None:
        """The explicit mask of a packed or masked tensor, else None."""
        ...

    def digest(self) -> str:
        """Identity of names, sizes, headers and (sampled) contents."""
        ...

    def nbytes(self) -> int:
        """Bytes of all tensors when read, that is dense."""
        ...


class StoredSource(TensorSource, Protocol):
    """A source that can also hand out what is stored, so that a checkpoint is copied and not computed again."""

    def record(self, key: str) -> MatrixRecord | None:
        """What is known of the mask of `key` without reading it."""
        ...

    def records(self) -> dict[str, MatrixRecord]:
        """All records, by key."""
        ...

    def bits(self, key: str) -> Tensor:
        """Checked mask rows, uint8 [rows, ceil(in / 8)]."""
        ...

    def values(self, key: str) -> Tensor | None:
        """Packed entries [nnz] as stored, or None when the tensor is stored dense."""
        ...

    def scales(self, key: str) -> Tensor | None:
        """Scales of packed entries that are int8, else None."""
        ...

    def chunks(self, key: str) -> Iterator[Tensor]:
        """Bytes of the dense tensor as uint8 pieces."""
        ...

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along the first dimension."""
        ...


class FolderSource:
    """A checkpoint folder: dense (with or without masks), sparse, or in the old bitmask layout.

    `folder`, `config` (config.json as a dict), `files` (which weight files are read). Where dense and sparse files lie
    side by side the dense ones are read, with the masks beside them.
    """

    def __init__(self, folder: Path, weights: WeightFiles | None = None) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = read_config(self.folder)
        self.files = weights or find_weights(self.folder)
        self._table = open_files(self.files.weights)
        self._check_index()
        self._masks = None if self.files.masks is None else self._open_masks(self.files.masks)

    def keys(self) -> list[str]:
        return self._table.keys()

    def meta(self, key: str) -> TensorMeta:
        return self._table.meta(key)

    def read(self, key: str) -> Tensor:
        return self._table.read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._table.read_rows(key, start, stop)

    def record(self, key: str) -> MatrixRecord | None:
        found = self._table.record(key)
        if found is None and self._masks is not None:
            found = self._masks.record(key)
        return found

    def records(self) -> dict[str, MatrixRecord]:
        return {key: record for key in self.keys() if (record := self.record(key)) is not None}

    def pattern(self, key: str) -> str | None:
        """The pattern of the explicit mask of `key`, or None."""
        record = self.record(key)
        return None if record is None else record.pattern

    def bits(self, key: str) -> Tensor:
        if self._table.record(key) is None and self._masks is not None:
            return self._masks.bits(key)
        return self._table.bits(key)

    def values(self, key: str) -> Tensor | None:
        return None if self._table.record(key) is None else self._table.values(key)

    def scales(self, key: str) -> Tensor | None:
        return self._table.scales(key)

    def mask(self, key: str) -> SourceMask | None:
        record = self.record(key)
        return None if record is None else SourceMask(self.bits(key), record)

    def chunks(self, key: str) -> Iterator[Tensor]:
        return self._table.chunks(key)

    def nbytes(self) -> int:
        return self._table.nbytes()

    def digest(self) -> str:
        files = [*self.files.weights, *([self.files.masks] if self.files.masks else []), self.folder / "config.json"]
        return _digest((file.name, file) for file in files)

    def _check_index(self) -> None:
        """Every key that the index names is in the file that it names."""
        headers = {file.name: file for file in self._table.files}
        for key, name in self.files.index.items():
            if key not in headers[name].entries:
                raise CheckpointError(
                    f"tensor {key} is not in {name}, where the index of {self.folder} says",
                    hint="index and shards belong to different checkpoints",
                )

    def _open_masks(self, path: Path) -> TensorTable:
        masks = TensorTable([SafeFile(path)], values=False)
        keys = masks.keys()
        for key in keys:
            record = masks.record(key)
            if record is None:
                raise CheckpointError(f"{path}: tensor {key} has no record in the metadata")
            if key not in self._table or self._table.meta(key).shape != record.shape:
                raise CheckpointError(f"{path}: the mask of {key} {list(record.shape)} fits no tensor beside it")
        return masks


class OverlaySource:
    """`base` with the keys of finished part files in its place; parts may also add keys.

    Every `*.safetensors` in `parts` counts, whatever its name. CheckpointError for a key in two parts.
    """

    def __init__(self, base: StoredSource, parts: Path) -> None:
        self.base = base
        self._paths = sorted(Path(parts).glob("*.safetensors"))
        self._parts = open_files(self._paths)
        self._own = set(self._parts.keys())

    def keys(self) -> list[str]:
        return sorted(self._own.union(self.base.keys()), key=natural_key)

    def _of(self, key: str) -> Any:
        return self._parts if key in self._own else self.base

    def meta(self, key: str) -> TensorMeta:
        return self._of(key).meta(key)

    def read(self, key: str) -> Tensor:
        return self._of(key).read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._of(key).read_rows(key, start, stop)

    def record(self, key: str) -> MatrixRecord | None:
        return self._of(key).record(key)

    def records(self) -> dict[str, MatrixRecord]:
        return {key: record for key in self.keys() if (record := self.record(key)) is not None}

    def bits(self, key: str) -> Tensor:
        return self._of(key).bits(key)

    def values(self, key: str) -> Tensor | None:
        if key in self._own:
            return None if self._parts.record(key) is None else self._parts.values(key)
        return self.base.values(key)

    def scales(self, key: str) -> Tensor | None:
        return self._of(key).scales(key)

    def mask(self, key: str) -> SourceMask | None:
        return self._of(key).mask(key)

    def chunks(self, key: str) -> Iterator[Tensor]:
        return self._of(key).chunks(key)

    def nbytes(self) -> int:
        return sum(self.meta(key).nbytes for key in self.keys())

    def digest(self) -> str:
        parts = _digest((path.name, path) for path in self._paths)
        return hashlib.sha256(f"{self.base.digest()} {parts}".encode()).hexdigest()


def open_source(model: str | Path, revision: str | None = None, token: str | None = None) -> FolderSource:
    """The checkpoint in a folder or of a hub id (downloaded to the hub's cache).

    Raises ModelError (no such model, no usable weights) or CheckpointError (damaged files), each with a hint.
    """
    return FolderSource(resolve_folder(model, revision=revision, token=token))


def _digest(files: Any) -> str:
    lines = [[name, file_digest(path)] for name, path in files]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()
