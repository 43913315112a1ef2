"""What is in an adapter's folder, layer by layer. No model is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .adapters import LORA, PARTS, PREFIX, SPIEL, Adapter, open_adapter

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def adapter_info(folder: str | Path) -> dict[str, Any]:
    """Method, base and bytes; of sparse deltas and LoRA the numbers stored for every layer and the norm of its delta.

    Returns:
        "layers": {"layer", "rows", "entries", "bytes", "norm"}, of sparse deltas also "largest", of LoRA "rank";
        "entries": stored numbers of all layers, of other methods those of the whole file; "other_tensors": the rest.
    """
    adapter = open_adapter(folder)
    if adapter.kind in _LAYERS:
        rows, others = _LAYERS[adapter.kind](adapter)
        entries = sum(row["entries"] for row in rows)
    else:
        rows, others = [], list(adapter.file.entries)
        entries = sum(math.prod(entry.shape) for entry in adapter.file.entries.values())
    return {
        "adapter": str(folder),
        "method": adapter.kind,
        "base": adapter.config.get("base_model_name_or_path"),
        "fingerprint": adapter.config.get("base_fingerprint"),
        "layers": rows,
        "entries": entries,
        "bytes": adapter.file.size,
        "bytes_per_entry": adapter.file.size / entries if entries else None,
        "other_tensors": others,
    }


def _sparse(adapter: Adapter) -> tuple[list[dict[str, Any]], list[str]]:
    rows = []
    for layer in adapter.layers():
        delta = adapter.delta(layer)
        values = delta.values.float()
        rows.append(
            {
                "layer": layer.removeprefix(PREFIX),
                "rows": len(delta.counts),
                "entries": len(values),
                "bytes": sum(adapter.file.entries[f"{layer}.{part}"].nbytes for part in PARTS),
                "norm": float(values.norm()),
                "largest": float(values.abs().max()) if len(values) else 0.0,
            }
        )
    return rows, list(adapter.others())


def _lora(adapter: Adapter) -> tuple[list[dict[str, Any]], list[str]]:
    """||s B A|| is the root of s^2 tr((B^T B)(A A^T)): no matrix of the layer's size is made."""
    entries = adapter.file.entries
    layers = [
        key.removesuffix(DOWN) for key in entries if key.endswith(DOWN) and key.removesuffix(DOWN) + UP in entries
    ]
    rows = []
    for layer in layers:
        down, up = (adapter.file.read(layer + part).double().flatten(1) for part in (DOWN, UP))
        if up.shape[1] != len(down):
            raise CheckpointError(
                f"{adapter.file.path}: {layer.removeprefix(PREFIX)} has {len(down)} rows of A and "
                f"{up.shape[1]} columns of B, which have to be the rank"
            )
        square = float(((up.t() @ up) * (down @ down.t())).sum())
        name = layer.removeprefix(PREFIX)
        rows.append(
            {
                "layer": name,
                "rows": len(up),
                "rank": len(down),
                "entries": down.numel() + up.numel(),
                "bytes": entries[layer + DOWN].nbytes + entries[layer + UP].nbytes,
                "norm": _scale(adapter.config, name, len(down)) * math.sqrt(max(0.0, square)),
            }
        )
    found = {layer + part for layer in layers for part in (DOWN, UP)}
    return rows, [key for key in entries if key not in found]


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """peft's factor: alpha over the rank, or over its root. Of patterns, the first that fits the name's end."""
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    own = next((alpha for end, alpha in patterns.items() if re.match(rf"(.*\.)?({end})$", layer)), None)
    alpha = float((config.get("lora_alpha") or 1) if own is None else own)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


_LAYERS = {SPIEL: _sparse, LORA: _lora}
