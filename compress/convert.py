"""`gossamer convert`: the dense and the sparse form of a checkpoint, one into the other; lossless unless it is asked to
round."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ..errors import ModelError, RecipeError
from .activation.file import copy_policy
from .checkpoint import KINDS, MAX_SHARD_SIZE, assemble, atomic_write_text, partial_folder, publish, verify
from .converted import refresh_report
from .format import METADATA_KEY, dense_config, sparse_config
from .modelfolder import MASKS
from .source import FolderSource, StoredSource, open_source
from .values import KINDS as VALUES
from .values import with_values
from .writer import storage_errors

_MARKER = "conversion-unfinished"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")


def convert(
    src: str | Path,
    out: str | Path,
    to: str,
    *,
    values: str = "same",
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    masks_from_zeros: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> list[Path]:
    """Write the checkpoint `src` (any form that Gossamer reads) to the new folder `out`; returns its weight files.

    `to`: "dense" or "sparse". Every tensor keeps its bits and every explicit mask is kept; config.json gains or loses
    `quantization_config`; tokenizer and other files are copied. OUT appears only after it was read back and compared.
    `values`: "same" writes floats, of int8 values what they stand for; "int8" rounds the kept weights of matrices with
    masks to int8 values, which loses precision (int8 values stay as they are).
    `masks_from_zeros`: take exact zeros of a checkpoint without masks for pruned weights.
    RecipeError for a wrong request, ModelError and CheckpointError for a wrong checkpoint, ResourceError for the disk.
    """
    if to not in KINDS:
        raise RecipeError(f"--to {to!r} is unknown; allowed: {', '.join(KINDS)}")
    if values not in VALUES:
        raise RecipeError(f"--values {values!r} is unknown; allowed: {', '.join(VALUES)}")
    folder = open_source(src, revision=revision, token=token)
    out = Path(os.path.abspath(out))
    partial = _check_place(folder, out, overwrite)
    _check_quantization(folder)
    masked = _with_masks(folder, to, values, masks_from_zeros, trust_remote_code)
    rounded = values == "int8" and any(record.int8 is None for record in masked.records().values())
    source = with_values(masked, values)
    work = _start(partial)
    try:
        files = assemble(source, work, to, max_shard_size)
        checked = verify(work, source, to)
        build = sparse_config if to == "sparse" else dense_config
        config = build(folder.config, checked.summary)
        atomic_write_text(work / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        copy_companions(folder.folder, work)
        copy_policy(folder.folder, folder.config, work)
        packed = sum(record.nbytes(source.meta(key).dtype) for key, record in source.records().items())
        refresh_report(work, out.name, to, checked.payload, packed, rounded=rounded)
        publish(work, out, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out / file.relative_to(work) for file in files]


def _check_place(source: FolderSource, out: Path, overwrite: bool) -> Path:
    """The partial folder for `out`; an unfinished conversion there is removed, anything else is not touched."""
    if source.folder.resolve() == out.resolve():
        raise RecipeError(f"{out} is the checkpoint itself", hint="write to another folder")
    return partial_folder(out, _MARKER, overwrite=overwrite)


def _check_quantization(source: FolderSource) -> None:
    """Only our own and the old bitmask layout mean float weights; of others the config must not be thrown away."""
    found = source.config.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found
    quantised = isinstance(found, dict) and bool(found.get("config_groups"))
    if method not in (METADATA_KEY, "compressed-tensors") or quantised:
        raise ModelError(
            f"{source.folder} is quantised ({method}); only float weights are converted",
            hint="give the original model, or dequantise it first",
        )


def _with_masks(
    folder: FolderSource, to: str, values: str, masks_from_zeros: bool, trust_remote_code: bool
) -> StoredSource:
    if masks_from_zeros:
        if to != "sparse":
            raise RecipeError("--masks-from-zeros makes masks for sparse weights", hint="use it with --to sparse")
        if folder.records():
            raise RecipeError(f"{folder.folder} has explicit masks", hint="leave out --masks-from-zeros")
        from .zeros import ZerosSource

        zeros = ZerosSource(folder, trust_remote_code=trust_remote_code)
        if not zeros.records():
            raise RecipeError(f"{folder.folder} has no matrix with enough zeros to become smaller")
        return zeros
    if (to == "sparse" or values == "int8") and not folder.records():
        raise RecipeError(
            f"{folder.folder} has no masks, and zeros are not taken for pruned weights by themselves",
            hint="add --masks-from-zeros if they are, or prune it with gossamer compress",
        )
    return folder


def _start(partial: Path) -> Path:
    """Create `partial` with the marker, and in it the folder that will become OUT."""
    with storage_errors(partial, 0):
        partial.mkdir(parents=True)
        (partial / _MARKER).touch()
        (partial / "files").mkdir()
    return partial / "files"


def copy_companions(source: Path, out: Path) -> None:
    """Everything beside the weights: tokenizer, generation config, recipe, report, model card, own code."""
    paths = [*source.iterdir(), *(source / MASKS).parent.glob("*")]
    for path in sorted(paths):
        if path.is_file() and _belongs(path) and not (out / path.relative_to(source)).exists():
            target = out / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            with storage_errors(target, path.stat().st_size):
                shutil.copyfile(path, target)


def _belongs(path: Path) -> bool:
    index = path.name.startswith(("model.", "pytorch_model.")) and ".index" in path.name
    return not index and path.suffix not in _WEIGHTS and not path.name.startswith(".")
