"""From finished parts to a checkpoint: assembled file by file, read back and verified, then given its name.

files = assemble(source, folder, "sparse")     # repeatable: the same source gives the same bytes
checked = verify(folder, source, "sparse")     # reads the files by other means than they were written
publish(partial, out)                          # one rename
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RecipeError
from .failpoint import failpoint
from .format import BITMASK, SCALES, VALUES, MatrixRecord, metadata
from .modelfolder import DENSE, DENSE_INDEX, MASKS, SPARSE, SPARSE_INDEX
from .packing import packed_values, written_records
from .source import StoredSource
from .table import byte_view, natural_key
from .verify import Verified, verify
from .writer import Output, atomic_write_text, replacing, storage_errors, sync_folder, write_file

__all__ = ["Verified", "assemble", "atomic_write_text", "publish", "replacing", "sync_tree", "verify"]

MAX_SHARD_SIZE = 5 * 10**9
KINDS = ("dense", "sparse")


def assemble(source: StoredSource, out: Path, kind: str, max_shard_size: int = MAX_SHARD_SIZE) -> list[Path]:
    """Write the weights of `source` into `out` and return the files, the index (if any) last.

    "sparse": `model.sparse.safetensors`, every matrix with a mask packed. "dense": `model.safetensors`, and the masks
    in `gossamer/masks.safetensors`. More than `max_shard_size` bytes of tensors go to several files with an index, all
    under transformers' names. Files of an earlier, interrupted call are replaced. One tensor in memory at a time.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}; allowed: {', '.join(KINDS)}")
    out.mkdir(parents=True, exist_ok=True)
    records = written_records(source, kind)
    keys = source.keys()
    shards = _shards([_outputs(source, key, records.get(key), kind) for key in keys], max_shard_size)
    names = _names(kind, len(shards))
    files = []
    for name, outputs in zip(names, shards, strict=True):
        inside = {item.name for item in outputs}
        held = {key: record for key, record in records.items() if kind == "sparse" and key + BITMASK in inside}
        write_file(out / name, outputs, metadata(held), halfway="assemble")
        files.append(out / name)
    if kind == "dense" and records:
        files.append(_write_masks(source, out, records))
    if len(shards) > 1:
        files.append(_write_index(out, kind, names, shards))
    return files


def partial_folder(out: Path, marker: str, *, overwrite: bool) -> Path:
    """Where `out` is made; what a run that put `marker` there left unfinished is removed, all else is not touched.

    Raises:
        RecipeError: `out` has content and `overwrite` is not given, or the place is taken by another unfinished run.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise RecipeError(f"{out} exists and is not empty", hint="choose another folder, or add --overwrite")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        if not (partial / marker).is_file():
            raise RecipeError(f"{partial} holds an unfinished run", hint="finish or remove it first")
        shutil.rmtree(partial)
    return partial


def publish(partial: Path, out: Path, *, overwrite: bool = False) -> None:
    """Flush every file of the verified folder `partial` and rename it to `out`.

    An empty `out` gives way; one with content only with `overwrite`, else RecipeError. It is moved aside first and
    removed at the end, so a kill at any point loses neither.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise RecipeError(f"{out} exists and is not empty", hint="choose another folder, or replace it: --overwrite")
    with storage_errors(out, 0):
        sync_tree(partial)
        failpoint("publish")
        replaced = out.with_name(out.name + ".replaced")
        if out.exists():
            _remove(replaced)
            out.rename(replaced)
        partial.rename(out)
        sync_folder(out.parent)
        failpoint("published")
        _remove(replaced)


def _outputs(source: StoredSource, key: str, record: MatrixRecord | None, kind: str) -> list[Output]:
    """The tensors that hold `key`; sizes are known, data is read when it is written."""
    meta = source.meta(key)
    if kind == "dense" or record is None:
        return [Output(key, meta.dtype, meta.shape, lambda: source.chunks(key))]

    def bits() -> Iterator[Tensor]:
        yield byte_view(source.bits(key))

    def values() -> Iterator[Tensor]:
        yield byte_view(packed_values(source, key))

    def scales() -> Iterator[Tensor]:
        found = source.scales(key)
        assert found is not None
        yield byte_view(found)

    mask = Output(key + BITMASK, torch.uint8, record.bits_shape, bits)
    if record.int8 is None:
        return [mask, Output(key + VALUES, meta.dtype, (record.nnz,), values)]
    return [
        mask,
        Output(key + VALUES, torch.int8, (record.nnz,), values),
        Output(key + SCALES, torch.float16, record.scales_shape, scales),
    ]


def _shards(units: list[list[Output]], limit: int) -> list[list[Output]]:
    """Units in order, a new shard where the next would exceed `limit`. A matrix' own tensors stay together."""
    shards: list[list[Output]] = [[]]
    filled = 0
    for unit in units:
        size = sum(item.nbytes for item in unit)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1] += unit
        filled += size
    return shards


def _names(kind: str, count: int) -> list[str]:
    if count == 1:
        return [DENSE if kind == "dense" else SPARSE]
    stem = "model" if kind == "dense" else "model.sparse"
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_index(out: Path, kind: str, names: list[str], shards: list[list[Output]]) -> Path:
    where = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
    total = sum(item.nbytes for shard in shards for item in shard)
    index = {"metadata": {"total_size": total}, "weight_map": {k: where[k] for k in sorted(where, key=natural_key)}}
    path = out / (DENSE_INDEX if kind == "dense" else SPARSE_INDEX)
    atomic_write_text(path, json.dumps(index, indent=2) + "\n")
    return path


def _write_masks(source: StoredSource, out: Path, records: dict[str, MatrixRecord]) -> Path:
    def one(key: str) -> Output:
        return Output(key + BITMASK, torch.uint8, records[key].bits_shape, lambda: iter([byte_view(source.bits(key))]))

    path = out / MASKS
    write_file(path, [one(key) for key in records], metadata(records))
    return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(path))
