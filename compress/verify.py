"""Reading a written checkpoint back by other means than it was written: safetensors' own reader, numpy, hashlib."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..kernels.int8.dispatch import GROUP
from .failpoint import failpoint
from .format import BITMASK, METADATA_KEY, SCALES, VALUES, MatrixRecord, Summary, stored_names, summarise
from .modelfolder import find_weights
from .packing import as_integers, holds, written_records
from .source import StoredSource
from .table import byte_view


@dataclass
class Verified:
    """What was found. `payload`: bytes of tensors per weight file; `zeros`: entries equal to zero in masked tensors."""

    summary: Summary
    tensors: int = 0
    zeros: int = 0
    payload: dict[str, int] = field(default_factory=dict)


def verify(out: Path, source: StoredSource, kind: str) -> Verified:
    """Compare every tensor in `out` with `source`, bit for bit, and every mask with its record.

    Checked: the same keys, dtypes and shapes; pruned entries are +0.0; at least as many zeros as the mask prunes; N:M
    and block structure; the sha256 of the mask. CheckpointError names the first tensor that differs.
    """
    if kind not in ("dense", "sparse"):
        raise ValueError(f"kind {kind!r}")
    weights = find_weights(out, kind)
    records = written_records(source, kind)
    with ExitStack() as stack:
        files = _Files(list(weights.weights), stack)
        masks = None
        if kind == "dense" and records:
            if weights.masks is None:
                raise _differs(out, "gossamer/masks.safetensors is missing")
            masks = _Files([weights.masks], stack)
        _check_names(out, files, source, records, kind)
        if weights.index and weights.index != files.file_of:
            raise _differs(out, "the index does not say which tensor is in which file")
        _check_records(out, masks or files, records)
        found = Verified(summarise(records), payload=files.payload())
        keys = source.keys()
        for key in keys:
            failpoint("verify")
            found.zeros += _check(out, key, source, records.get(key), files, masks, kind)
            found.tensors += 1
    return found


class _Files:
    """Several safetensors files as one, through the safetensors library."""

    def __init__(self, paths: list[Path], stack: ExitStack) -> None:
        self.where: dict[str, Any] = {}
        self.file_of: dict[str, str] = {}
        self.matrices: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        for path in paths:
            try:
                handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read back: {error}") from error
            self.where.update(dict.fromkeys(handle.keys(), handle))
            self.file_of.update(dict.fromkeys(handle.keys(), path.name))
            self.matrices.update(_matrices(path, handle.metadata() or {}))
            with open(path, "rb") as file:
                header = 8 + int.from_bytes(file.read(8), "little")
            self._sizes[path.name] = path.stat().st_size - header

    def get(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def payload(self) -> dict[str, int]:
        return self._sizes


def _matrices(path: Path, file_metadata: dict[str, str]) -> dict[str, Any]:
    try:
        document = json.loads(file_metadata.get(METADATA_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata {METADATA_KEY!r} is not JSON: {error}") from error
    return document.get("matrices", {})


def _check_names(out: Path, files: _Files, source: StoredSource, records: dict[str, MatrixRecord], kind: str) -> None:
    expected = set(_stored_names(source, records, kind))
    odd = sorted(expected ^ files.where.keys())
    if odd:
        raise _differs(out, f"tensor {odd[0]} is {'missing' if odd[0] in expected else 'not in the source'}")


def _stored_names(source: StoredSource, records: dict[str, MatrixRecord], kind: str) -> Iterator[str]:
    keys = source.keys()
    for key in keys:
        yield from stored_names(key, records[key]) if kind == "sparse" and key in records else (key,)


def _check_records(out: Path, files: _Files, records: dict[str, MatrixRecord]) -> None:
    expected = {key: record.to_json() for key, record in records.items()}
    if files.matrices != expected:
        odd = sorted(k for k in expected.keys() | files.matrices.keys() if expected.get(k) != files.matrices.get(k))
        raise _differs(out, f"the record of {odd[0]} is not what was written")


def _check(
    out: Path,
    key: str,
    source: StoredSource,
    record: MatrixRecord | None,
    files: _Files,
    masks: _Files | None,
    kind: str,
) -> int:
    if record is None:
        _check_plain(out, key, source, files.get(key))
        return 0
    kept = _kept(out, key, record, source, masks or files)
    if kind == "sparse" and record.int8 is not None:
        _check_int8(out, key, source, files)
    found = _expanded(out, key, record, kept, files) if kind == "sparse" else files.get(key)
    _check_meta(out, key, source, found)
    if not torch.equal(as_integers(found), as_integers(source.read(key))):
        raise _differs(out, f"tensor {key} is not bit-equal to what was written")
    return _check_zeros(out, key, record, kept, found)


def _check_int8(out: Path, key: str, source: StoredSource, files: _Files) -> None:
    """Values and scales themselves: other ones could give the same weights."""
    for name, wanted in ((key + VALUES, source.values(key)), (key + SCALES, source.scales(key))):
        found = files.get(name)
        if wanted is None or found.dtype != wanted.dtype or not torch.equal(as_integers(found), as_integers(wanted)):
            raise _differs(out, f"tensor {name} is not bit-equal to what was written")


def _check_meta(out: Path, key: str, source: StoredSource, found: Tensor) -> None:
    wanted = source.meta(key)
    if found.dtype != wanted.dtype or tuple(found.shape) != wanted.shape:
        raise _differs(
            out, f"tensor {key} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        )


def _check_plain(out: Path, key: str, source: StoredSource, found: Tensor) -> None:
    """Piece by piece: an embedding may be larger than everything else."""
    _check_meta(out, key, source, found)
    content = byte_view(found)
    position = 0
    for piece in source.chunks(key):
        if not torch.equal(content[position : position + len(piece)], piece):
            raise _differs(out, f"tensor {key} is not bit-equal to what was written")
        position += len(piece)


def _kept(out: Path, key: str, record: MatrixRecord, source: StoredSource, files: _Files) -> Tensor:
    """bool [rows, in], after every check of the mask."""
    bits = files.get(key + BITMASK)
    if tuple(bits.shape) != record.bits_shape or not torch.equal(bits, source.bits(key)):
        raise _differs(out, f"the mask of {key} is not bit-equal to what was written")
    if hashlib.sha256(bits.contiguous().numpy().tobytes()).hexdigest() != record.mask_sha256:
        raise _differs(out, f"the mask of {key} does not have the sha256 of its record")
    unpacked = np.unpackbits(bits.numpy(), axis=1, count=record.cols, bitorder="little")
    count = int(np.count_nonzero(unpacked))
    if count != record.nnz:
        raise _differs(out, f"the mask of {key} keeps {count} entries, its record says {record.nnz}")
    kept = torch.from_numpy(unpacked.view(np.bool_))
    if not holds(record, kept):
        raise _differs(out, f"the mask of {key} does not have the pattern {record.pattern}")
    return kept


def _expanded(out: Path, key: str, record: MatrixRecord, kept: Tensor, files: _Files) -> Tensor:
    values = files.get(key + VALUES)
    if tuple(values.shape) != (record.nnz,):
        raise _differs(out, f"tensor {key + VALUES} has shape {list(values.shape)}, not [{record.nnz}]")
    if (values.dtype == torch.int8) != (record.int8 is not None):
        raise _differs(out, f"tensor {key + VALUES} is {values.dtype}")
    integers = as_integers(values).numpy()
    rows = np.zeros(kept.shape, integers.dtype)
    rows[kept.numpy()] = integers
    if record.int8 is None:
        return record.from_rows(torch.from_numpy(rows).view(values.dtype))
    return record.from_rows(_multiplied(rows.view(np.int8), files.get(key + SCALES), record.int8))


def _multiplied(values: np.ndarray, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 values [rows, in] times their scales; exact in float32, rounded by torch to what numpy may not know."""
    per_input = scales.numpy().astype(np.float32)[:, np.arange(values.shape[1]) // GROUP]
    return torch.from_numpy(values.astype(np.float32) * per_input).to(dtype)


def _check_zeros(out: Path, key: str, record: MatrixRecord, kept: Tensor, found: Tensor) -> int:
    rows = record.as_rows(found)
    if bool(((as_integers(rows) != 0) & ~kept).any()):
        raise _differs(out, f"tensor {key} has entries that are not +0.0 although its mask prunes them")
    zeros = math.prod(record.shape) - int(rows.count_nonzero()) if found.element_size() > 1 else record.zeros
    if zeros < record.zeros:
        raise _differs(out, f"tensor {key} has {zeros} zeros, its mask prunes {record.zeros}")
    return zeros


def _differs(out: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{out}: {what}", hint="the disk or another program changed the files: repeat the command")
