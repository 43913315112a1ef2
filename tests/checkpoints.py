"""Safetensors files and checkpoint folders for tests, written byte by byte without the code under test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
CONFIG = {"model_type": "llama", "vocab_size": 11, "architectures": ["LlamaForCausalLM"]}


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes in C order."""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()) if tensor.numel() else b""


def header_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    return header


def write_raw(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    edit: Callable[[dict[str, Any]], Any] | None = None,
    text: str | None = None,
    length: int | None = None,
    cut: int | None = None,
) -> Path:
    """A safetensors file; `edit` changes the header, `text` replaces it, `length` lies about it, `cut` truncates."""
    header = header_of(tensors, metadata)
    if edit is not None:
        header = edit(header) or header
    encoded = (json.dumps(header) if text is None else text).encode()
    data = b"".join(raw(tensor) for tensor in tensors.values())
    content = (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if cut is None else content[:cut])
    return path


def bits_of(rows: torch.Tensor) -> torch.Tensor:
    """Packed bits of bool [rows, in], by numpy."""
    return torch.from_numpy(np.packbits(rows.numpy(), axis=1, bitorder="little").copy())


def packed_of(
    key: str, tensor: torch.Tensor, kept: torch.Tensor, *, transposed: bool = False, pattern: str = "0.5"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """({K_bitmask, K_values}, record) of a source tensor and its mask in the same orientation."""
    swap = (lambda t: t.transpose(-1, -2)) if transposed else (lambda t: t)
    cols = swap(tensor).shape[-1]
    rows, values = swap(kept).reshape(-1, cols), swap(tensor).reshape(-1, cols)
    bits = bits_of(rows)
    record = {
        "shape": list(tensor.shape),
        "in": cols,
        "transposed": transposed,
        "pattern": pattern,
        "nnz": int(kept.sum()),
        "mask_sha256": hashlib.sha256(raw(bits)).hexdigest(),
    }
    return {key + "_bitmask": bits, key + "_values": values[rows]}, record


def legacy(prefix: str, tensor: torch.Tensor, *, offsets: bool = True) -> dict[str, torch.Tensor]:
    """What the old compressor wrote: numpy's packed bits, the non-zero entries, shape and exclusive row sums."""
    array = tensor.float().numpy()
    kept = array != 0
    counts = kept.sum(1)
    made = {
        f"{prefix}.shape": torch.tensor(array.shape),
        f"{prefix}.compressed": tensor[torch.from_numpy(kept)],
        f"{prefix}.bitmask": torch.from_numpy(np.packbits(kept, axis=1, bitorder="little")),
        f"{prefix}.row_offsets": torch.from_numpy(np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)),
    }
    if not offsets:
        del made[f"{prefix}.row_offsets"]
        made[f"{prefix}.compressed"] = made[f"{prefix}.compressed"].view(array.shape[0], -1)
    return made


def own_metadata(records: Mapping[str, Any], version: int = 1) -> dict[str, str]:
    return {"format": "pt", "gossamer": json.dumps({"format_version": version, "matrices": dict(records)})}


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(*shape: int, seed: int = 0, share: float = 0.5) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 100)) < share


def model_folder(folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
