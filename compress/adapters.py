"""Folders of adapters: what is in one, the difference of two, the weighted sum of several. No model is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import CheckpointError, RecipeError
from ..finetune.spiel.delta import Delta, compare, weighted_sum
from .checkpoint import atomic_write_text
from .safefile import SafeFile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SPIEL = "SPIEL"
_PARTS = ("spiel_values", "spiel_columns", "spiel_counts")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: its configuration and its file, headers checked."""

    folder: Path
    config: dict[str, Any]
    file: SafeFile

    @property
    def kind(self) -> str:
        """peft's name of the method, such as "SPIEL" or "LORA"."""
        return str(self.config.get("peft_type"))

    def layers(self) -> list[str]:
        """Names of the layers with sparse deltas, in the file's order."""
        end = f".{_PARTS[0]}"
        return [key.removesuffix(end) for key in self.file.entries if key.endswith(end)]

    def delta(self, layer: str) -> Delta:
        """One layer's entries. CheckpointError for a tensor that is missing."""
        missing = [part for part in _PARTS if f"{layer}.{part}" not in self.file.entries]
        if missing:
            raise CheckpointError(f"{self.file.path}: {layer} has no {missing[0]}", hint="the file is damaged")
        values, columns, counts = (self.file.read(f"{layer}.{part}") for part in _PARTS)
        if len(values) != len(columns) or int(counts.to(torch.int64).sum()) != len(values):
            raise CheckpointError(f"{self.file.path}: tensors of {layer} do not fit each other")
        return Delta(values, columns, counts)

    def others(self) -> Iterator[str]:
        """Names of the tensors that belong to no sparse delta, such as those of modules_to_save."""
        return (key for key in self.file.entries if not key.endswith(_PARTS))


def open_adapter(folder: str | Path) -> Adapter:
    """CheckpointError for a folder that holds no adapter."""
    path = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path} holds no adapter: {name} is missing",
                hint="gossamer finetune writes one to OUT/gossamer/adapter-<stage>; name that folder",
            )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG} is not a JSON object")
    return Adapter(path, config, SafeFile(path / WEIGHTS))


def adapter_info(folder: str | Path) -> dict[str, Any]:
    """Method, base, bytes, and of sparse deltas the entries of every layer."""
    adapter = open_adapter(folder)
    rows: list[dict[str, Any]] = []
    for layer in adapter.layers() if adapter.kind == SPIEL else []:
        delta = adapter.delta(layer)
        values = delta.values.float()
        rows.append(
            {
                "layer": layer.removeprefix(_PREFIX),
                "rows": len(delta.counts),
                "entries": len(values),
                "bytes": sum(adapter.file.entries[f"{layer}.{part}"].nbytes for part in _PARTS),
                "norm": float(values.norm()),
                "largest": float(values.abs().max()) if len(values) else 0.0,
            }
        )
    entries = sum(row["entries"] for row in rows)
    return {
        "adapter": str(folder),
        "method": adapter.kind,
        "base": adapter.config.get("base_model_name_or_path"),
        "fingerprint": adapter.config.get("base_fingerprint"),
        "layers": rows,
        "entries": entries,
        "bytes": adapter.file.size,
        "bytes_per_entry": adapter.file.size / entries if entries else None,
        "other_tensors": list(adapter.others()) if adapter.kind == SPIEL else list(adapter.file.entries),
    }


def diff_adapters(first: str | Path, second: str | Path, out: Path | None = None) -> dict[str, Any]:
    """Positions that two adapters share and how far apart they are; `out`: the adapter first - second."""
    a, b = _spiel(first), _spiel(second)
    rows = []
    for layer in dict.fromkeys([*a.layers(), *b.layers()]):
        one, other = (_delta_or_none(adapter, layer, b if adapter is a else a) for adapter in (a, b))
        rows.append({"layer": layer.removeprefix(_PREFIX), **compare(one, other)})
    entries = tuple(sum(row["entries"][i] for row in rows) for i in (0, 1))
    squares = tuple(math.fsum(row["squares"][i] for row in rows) for i in (0, 1))
    shared, norm = sum(row["shared"] for row in rows), math.sqrt(squares[0] * squares[1])
    if out is not None:
        combine([(first, 1.0), (second, -1.0)], out)
    return {
        "first": str(first),
        "second": str(second),
        "layers": rows,
        "entries": entries,
        "shared": shared,
        "overlap": shared / (sum(entries) - shared) if sum(entries) > shared else 1.0,
        "cosine": math.fsum(row["product"] for row in rows) / norm if norm else 0.0,
        "distance": math.sqrt(math.fsum(row["distance"] ** 2 for row in rows)),
    }


def combine(parts: Sequence[tuple[str | Path, float]], out: Path) -> dict[str, Any]:
    """Writes the adapter that is the sum of weight * adapter, at the union of their positions.

    Raises:
        RecipeError: OUT exists, or a weight is not finite.
        CheckpointError: adapters of different bases or methods, or with whole modules of their own.
    """
    if out.exists() and any(out.iterdir()):
        raise RecipeError(f"{out} is not empty", hint="name a new folder")
    if not all(math.isfinite(weight) for _, weight in parts):
        raise RecipeError("weights of adapters must be finite numbers")
    opened = [(_spiel(folder), weight) for folder, weight in parts]
    _check_same_base([adapter for adapter, _ in opened])
    tensors: dict[str, torch.Tensor] = {}
    entries = 0
    for layer in dict.fromkeys(layer for adapter, _ in opened for layer in adapter.layers()):
        found = [(adapter.delta(layer), weight) for adapter, weight in opened if layer in adapter.layers()]
        made = weighted_sum(found, layer.removeprefix(_PREFIX))
        entries += len(made.values)
        tensors |= dict(zip((f"{layer}.{p}" for p in _PARTS), (made.values, made.columns, made.counts), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = dict(opened[0][0].config)
    for name in ("density", "rank_equivalent", "num_weights"):
        config[name] = None
    targets: set[str] = set()
    for adapter, _ in opened:
        targets |= {layer.removeprefix(_PREFIX) for layer in adapter.layers()}
    config |= {"num_weights": max(1, entries), "target_modules": sorted(targets)}
    atomic_write_text(out / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return {"output": str(out), "entries": entries, "bytes": (out / WEIGHTS).stat().st_size}


def _spiel(folder: str | Path) -> Adapter:
    adapter = open_adapter(folder)
    if adapter.kind != SPIEL:
        raise CheckpointError(f"{folder} is an adapter of method {adapter.kind}; sparse deltas are needed here")
    others = list(adapter.others())
    if others:
        raise CheckpointError(f"{folder} also holds {others[0]}, which has no sum or difference")
    return adapter


def _delta_or_none(adapter: Adapter, layer: str, other: Adapter) -> Delta:
    """The layer's delta, or one without entries where only the other adapter has the layer."""
    if layer in adapter.layers():
        return adapter.delta(layer)
    delta = other.delta(layer)
    return Delta(delta.values[:0], delta.columns[:0], delta.counts.new_zeros(len(delta.counts)))


def _check_same_base(adapters: Sequence[Adapter]) -> None:
    known = {a.config.get("base_fingerprint") for a in adapters} - {None, "unchecked"}
    if len(known) > 1 and len({tuple(a.layers()) for a in adapters}) == 1:
        raise CheckpointError(
            "the adapters were trained on different weights", hint="their deltas do not add up to anything"
        )
