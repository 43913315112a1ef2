"""Whether checkpoints are copies of one parent under one mask, told from files alone: what may be averaged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ModelError
from .format import METADATA_KEY, summarise
from .source import FolderSource

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_FREE = ("quantization_config", METADATA_KEY, "transformers_version", "_name_or_path", "use_cache")


def check_copies(sources: Sequence[FolderSource], names: Sequence[str]) -> str:
    """The digest of the masks that all share. `names`: what messages call the sources.

    Raises:
        ModelError: configurations or tokenizers differ.
        CheckpointError: tensors, their shapes or dtypes, or masks differ.
    """
    first = sources[0]
    config, tokens = _config(first), _tokenizer(first.folder)
    for source, name in zip(sources[1:], names[1:], strict=True):
        other = _config(source)
        for key in sorted({*config, *other}):
            if config.get(key) != other.get(key):
                raise ModelError(
                    f"{names[0]} and {name} are different models: {key} is {config.get(key)!r} and {other.get(key)!r}",
                    hint="a soup is made of copies of one parent",
                )
        if tokens != (theirs := _tokenizer(source.folder)):
            file = next(key for key in _TOKENIZER if tokens.get(key) != theirs.get(key))
            raise ModelError(
                f"{names[0]} and {name} have different tokenizers ({file})",
                hint="a soup is made of copies of one parent",
            )
        _check_tensors(first, source, names[0], name)
    return summarise(first.records()).masks_sha256


def _check_tensors(first: FolderSource, other: FolderSource, name: str, other_name: str) -> None:
    keys, theirs = set(first.keys()), set(other.keys())
    if keys != theirs:
        odd = min(keys ^ theirs)
        raise CheckpointError(f"tensor {odd} is in {name if odd in keys else other_name} only")
    for key in first.keys():
        a, b = first.meta(key), other.meta(key)
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CheckpointError(
                f"tensor {key} is {a.dtype} {list(a.shape)} in {name} and {b.dtype} {list(b.shape)} in {other_name}"
            )
        one, two = first.record(key), other.record(key)
        if (one is None) != (two is None):
            raise CheckpointError(
                f"{key} has a mask in {name if one else other_name} only: the average would not be sparse",
                hint="prune once and train every candidate from that one parent",
            )
        if one is not None and two is not None and one.mask_sha256 != two.mask_sha256:
            raise CheckpointError(
                f"{key} is masked differently in {name} and in {other_name}: an average of different masks would not "
                "be sparse",
                hint="prune once and train every candidate from that one parent",
            )


def _config(source: FolderSource) -> dict[str, Any]:
    return {key: value for key, value in source.config.items() if key not in _FREE}


def _tokenizer(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in _TOKENIZER
        if (folder / name).is_file()
    }
