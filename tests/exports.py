"""Sparse folders made from random models, and what is in them by means of their own: safetensors, json and numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import random_mask, same_bits
from families import save_family
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gossamer.compress.checkpoint import assemble
from gossamer.compress.format import pack, sparse_config, summarise
from gossamer.compress.source import OverlaySource, open_source
from gossamer.compress.writer import write_part

IN_OUT = ("c_attn", "c_proj", "c_fc", "gate_up_t")
NEVER = ("router", ".gate.weight", "bias", "sinks")


def inside(folder: Path) -> dict[str, tuple[torch.Tensor, bool]]:
    """Key -> (tensor, stored as [in, out]) of what has two or more dimensions inside the blocks."""
    found = {key: t for key, t in plain(folder).items() if t.dim() >= 2 and (".layers." in key or "h." in key)}
    kept = {key: t for key, t in found.items() if not any(name in key for name in NEVER)}
    return {key: (t, t.dim() == 3 or any(name in key for name in IN_OUT)) for key, t in kept.items()}


def plain(folder: Path, pattern: str = "model*.safetensors") -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob(pattern)) for key, t in load_file(path).items()}


def save_sparse(
    base: Path, out: Path, *, every: int = 1, share: float = 0.4, shard: int = 10**9, **config: Any
) -> Path:
    """`base` with random masks on every `every`-th matrix; the dropped weights are not zero in `base`."""
    packed = {}
    for i, (key, (tensor, transposed)) in enumerate(sorted(inside(base).items())[::every]):
        mask = random_mask(*tensor.shape, seed=i, share=share)
        packed[key] = pack(tensor, mask, pattern="0.6", transposed=transposed)
    parts = out.with_name(out.name + "-parts")
    write_part(parts / "block-00000.safetensors", {}, packed)
    source = open_source(base)
    assemble(OverlaySource(source, parts), out, "sparse", shard)
    summary = summarise({key: item.record for key, item in packed.items()})
    (out / "config.json").write_text(json.dumps(sparse_config(source.config, summary) | config))
    return out


def save_family_sparse(name: str, out: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    return save_sparse(save_family(name, out.with_name(out.name + "-base"), dtype=dtype), out, **options)


def expanded(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(dense tensors, bool masks in the same orientation) of a sparse folder, as docs/format.md says."""
    stored, records = plain(folder, "model.sparse*.safetensors"), {}
    for path in folder.glob("model.sparse*.safetensors"):
        with safe_open(path, "pt") as file:
            records |= json.loads((file.metadata() or {}).get("gossamer", '{"matrices": {}}'))["matrices"]
    masks = {}
    for key, record in records.items():
        bits, values = stored.pop(key + "_bitmask"), stored.pop(key + "_values")
        rows = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=record["in"], bitorder="little").astype(bool))
        dense = torch.zeros(rows.shape, dtype=values.dtype)
        dense[rows] = values
        stored[key], masks[key] = (_as_stored(t, record) for t in (dense, rows))
    return stored, masks


def _as_stored(rows: torch.Tensor, record: dict[str, Any]) -> torch.Tensor:
    shape = record["shape"]
    if not record["transposed"]:
        return rows.reshape(shape)
    return rows.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()


def dense_twin(folder: Path, out: Path) -> Path:
    """The same model as an ordinary checkpoint that no code of ours has written."""
    out.mkdir(parents=True)
    tensors, _ = expanded(folder)
    save_file({key: t.contiguous() for key, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "gossamer")}
    (out / "config.json").write_text(json.dumps(config))
    return out


def mask_twin(folder: Path, out: Path) -> Path:
    """An ordinary checkpoint whose weights are 1 where the masks of `folder` keep, 0 where they prune, 1 elsewhere."""
    out.mkdir(parents=True)
    tensors, masks = expanded(folder)
    ones = {key: masks.get(key, torch.ones(t.shape)).to(torch.float32).contiguous() for key, t in tensors.items()}
    save_file(ones, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "gossamer")}
    (out / "config.json").write_text(json.dumps(config))
    return out


def assert_same(model: Any, other: Any) -> None:
    """Every parameter and buffer of both, bit for bit."""
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert same_bits(tensor.cpu(), b[name].cpu()), name


def rewrite(folder: Path, edit: Any) -> None:
    """`edit(tensors, metadata)` changes one file of a sparse folder in place."""
    path = folder / "model.sparse.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    metadata = edit(tensors, metadata) or metadata
    save_file(tensors, path, metadata)
