"""What is in a checkpoint: per matrix its zeros, pattern, mask and bytes. One tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import GossamerError
from .activation.file import described
from .attachments import entries
from .blocks import StreamedModel
from .census import TensorCount, count_tensor, total
from .source import FolderSource, TensorSource, open_source


def inspect_model(
    model: str | Path, *, revision: str | None = None, token: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Rows per tensor inside the decoder blocks, and totals.

    A model that transformers cannot lay out (unknown architecture) is still counted, over its 2-D tensors.
    """
    source = open_source(str(model), revision=revision, token=token)
    prunable, note = _prunable(source, trust_remote_code)
    counts = [count_tensor(source, key) for key in source.keys()]
    totals = total(counts, set(prunable))
    rows = [_row(source, count, prunable.get(count.key)) for count in counts if count.key in prunable or count.pattern]
    return {
        "model": str(model),
        "layers": rows,
        "parameters": totals.parameters,
        "prunable_parameters": totals.prunable_parameters,
        "sparsity": {"prunable": totals.prunable_sparsity, "all": totals.sparsity, "zeros": totals.prunable_zeros},
        "bytes": {
            "dense": totals.dense_bytes,
            "stored": totals.stored_bytes,
            "ratio": totals.stored_bytes / totals.dense_bytes if totals.dense_bytes else 1.0,
        },
        "masks": sum(count.pattern is not None for count in counts),
        "activation": described(source.folder, source.config),
        "heads": _plan(source.config),
        "note": note,
    }


def _prunable(source: FolderSource, trust_remote_code: bool) -> tuple[dict[str, list[str]], str | None]:
    """Checkpoint key -> matrices it holds; by shape when the architecture is not known."""
    try:
        model = StreamedModel.open(source, source.folder, trust_remote_code=trust_remote_code)
    except GossamerError as error:
        keys = [key for key in source.keys() if len(source.meta(key).shape) == 2]
        return {key: [key] for key in keys}, f"architecture not recognised, all 2-D tensors are listed: {error.message}"
    result: dict[str, list[str]] = {}
    for index in range(model.num_blocks):
        for prunable in model.prunables(index):
            for key in model.source_keys(prunable):
                result.setdefault(key, []).append(prunable.name)
    return result, None


def _plan(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the head plan of a checkpoint says of itself: who made it, and the share of the KV bytes by length."""
    entry = entries(config).get("heads")
    if entry is None:
        return None
    made = entry.get("made") or {}
    return {"method": made.get("name") or made.get("method"), "density": entry["density"], "block": entry["block"]}


def _row(source: TensorSource, count: TensorCount, matrices: list[str] | None) -> dict[str, Any]:
    return {
        "key": count.key,
        "shape": list(count.shape),
        "dtype": count.dtype,
        "matrices": len(matrices or []),
        "zeros": count.zeros,
        "sparsity": count.zeros / count.size if count.size else 0.0,
        "pattern": count.pattern,
        "values": count.values,
        "mask_zeros": count.masked_zeros,
        "holds_pattern": _holds(source, count),
        "dense_bytes": count.dense_bytes,
        "stored_bytes": count.stored_bytes,
    }


def _holds(source: TensorSource, count: TensorCount) -> bool | None:
    """Whether the explicit mask really has its stated N:M pattern. None without a mask or for other patterns."""
    mask = source.mask(count.key)
    if mask is None or count.pattern is None or ":" not in count.pattern or count.pattern.startswith("block"):
        return None
    keep, group = (int(word) for word in count.pattern.split(":"))
    kept = mask.rows_bool()
    groups = kept.reshape(kept.shape[0], -1, group).sum(-1)
    return bool(torch.all(groups <= keep))
