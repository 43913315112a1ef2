"""A few tensors as a checkpoint folder of every form."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from checkpoints import (
    model_folder,
    own_metadata,
    packed_of,
    random_mask,
    random_tensor,
    write_raw,
)

A, B = "model.layers.2.a.weight", "model.layers.10.a.weight"
EMBED = "model.embed_tokens.weight"
TENSORS = {
    EMBED: random_tensor(11, 9, seed=1),
    B: random_tensor(7, 13, dtype=torch.bfloat16, seed=2),
    A: random_tensor(5, 3, dtype=torch.float16, seed=3),
    "model.norm.bias": torch.tensor(2, dtype=torch.int64),
}
MASK = random_mask(7, 13)


def single(folder: Path, tensors=None, name: str = "model.safetensors") -> Path:
    write_raw(model_folder(folder) / name, TENSORS if tensors is None else tensors, {"format": "pt"})
    return folder


def sharded(folder: Path) -> Path:
    names = {EMBED: "s1.safetensors", A: "s2.safetensors", B: "s2.safetensors", "model.norm.bias": "s1.safetensors"}
    for shard in ("s1.safetensors", "s2.safetensors"):
        write_raw(model_folder(folder) / shard, {k: TENSORS[k] for k in names if names[k] == shard})
    write_index(folder, names)
    return folder


def write_index(folder: Path, names, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def sparse(folder: Path, name: str = "model.sparse.safetensors") -> Path:
    packed, record = packed_of(B, TENSORS[B], MASK, pattern="0.5")
    plain = {key: tensor for key, tensor in TENSORS.items() if key != B}
    write_raw(model_folder(folder) / name, plain | packed, own_metadata({B: record}))
    return folder


def dense_with_masks(folder: Path) -> Path:
    single(folder, TENSORS | {B: TENSORS[B].masked_fill(~MASK, 0)})
    packed, record = packed_of(B, TENSORS[B], MASK, pattern="0.5")
    bits = {B + "_bitmask": packed[B + "_bitmask"]}
    write_raw(folder / "gossamer" / "masks.safetensors", bits, own_metadata({B: record}))
    return folder
