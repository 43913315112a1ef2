"""Folders of adapters: opening one, the difference of two, the weighted sum of several. No model is loaded."""

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
from ..finetune.spiel.base import UNCHECKED
from ..finetune.spiel.delta import Delta, compare, weighted_sum
from ..finetune.spiel.layout import COLUMNS, COUNTS, VALUES, decode
from .checkpoint import atomic_write_text
from .safefile import SafeFile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SPIEL, LORA = "SPIEL", "LORA"
PARTS = (VALUES, COLUMNS, COUNTS)
_MOST_INPUTS = 2**31 - 1
PREFIX = "base_model.model."


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
        """Names of the layers with sparse deltas, or with a part of one, in the file's order."""
        return list(dict.fromkeys(key.rpartition(".")[0] for key in self.file.entries if key.endswith(PARTS)))

    def delta(self, layer: str) -> Delta:
        """One layer's entries, checked as when they are loaded, but for the number of inputs, which no file says.

        CheckpointError for a tensor that is missing or damaged.
        """
        name = f"{self.file.path}: {layer.removeprefix(PREFIX)}"
        stored = {p: self.file.read(f"{layer}.{p}") for p in PARTS if f"{layer}.{p}" in self.file.entries}
        decode(stored, stored[COUNTS].numel() if COUNTS in stored else 0, _MOST_INPUTS, name)
        return Delta(*(stored[part] for part in PARTS))

    def others(self) -> Iterator[str]:
        """Names of the tensors that belong to no sparse delta, such as those of modules_to_save."""
        return (key for key in self.file.entries if not key.endswith(PARTS))


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


def diff_adapters(first: str | Path, second: str | Path, out: Path | None = None) -> dict[str, Any]:
    """Positions that two adapters share and how far apart they are; `out`: the adapter first - second."""
    a, b = _spiel(first), _spiel(second)
    rows = []
    for layer in dict.fromkeys([*a.layers(), *b.layers()]):
        one, other = (_delta_or_none(adapter, layer, b if adapter is a else a) for adapter in (a, b))
        rows.append({"layer": layer.removeprefix(PREFIX), **compare(one, other)})
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
        made = weighted_sum(found, layer.removeprefix(PREFIX))
        entries += len(made.values)
        tensors |= dict(zip((f"{layer}.{p}" for p in PARTS), (made.values, made.columns, made.counts), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = dict(opened[0][0].config)
    for name in ("density", "rank_equivalent", "num_weights"):
        config[name] = None
    targets: set[str] = set()
    for adapter, _ in opened:
        targets |= {layer.removeprefix(PREFIX) for layer in adapter.layers()}
    config |= {"num_weights": max(1, entries), "target_modules": sorted(targets)}
    config |= _fingerprints([adapter for adapter, _ in opened])
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
    """CheckpointError for adapters of different weights, as far as their files tell.

    By the fingerprints of the layers that they have in common; without any, by those of all layers where these are the
    same, and else by the names of the models.
    """
    known: dict[str, str] = {}
    compared = False
    for adapter in adapters:
        each = adapter.config.get("layer_fingerprints") or {}
        wrong = [layer for layer in each if known.get(layer, each[layer]) != each[layer]]
        if wrong:
            raise _different(f"{wrong[0]} had others")
        compared = compared or not known.keys().isdisjoint(each)
        known |= each
    if not compared and _same_layers(adapters):
        whole = {adapter.config.get("base_fingerprint") or UNCHECKED for adapter in adapters}
        if len(whole - {UNCHECKED}) > 1:
            raise _different("their fingerprints differ")
        compared = UNCHECKED not in whole
    names = {adapter.config.get("base_model_name_or_path") for adapter in adapters} - {None, ""}
    if len(names) > 1 and not compared:
        raise _different(f"of {' and '.join(sorted(map(str, names)))}")


def _different(why: str) -> CheckpointError:
    return CheckpointError(
        f"the adapters were trained on different weights: {why}", hint="their deltas do not add up to anything"
    )


def _same_layers(adapters: Sequence[Adapter]) -> bool:
    return len({tuple(adapter.layers()) for adapter in adapters}) == 1


def _fingerprints(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the sum knows of its base: of every layer what any of them knows, of all together if they have the same."""
    each: dict[str, str] = {}
    for adapter in adapters:
        each |= adapter.config.get("layer_fingerprints") or {}
    whole = {adapter.config.get("base_fingerprint") or UNCHECKED for adapter in adapters}
    kept = whole.pop() if len(whole) == 1 and _same_layers(adapters) else UNCHECKED
    return {"base_fingerprint": kept, "layer_fingerprints": each or None}
