"""Folders whose matrices have int8 values, and a reader of them by docs/format.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from exports import plain, save_sparse
from int8_cases import weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from gossamer.compress.convert import convert

SIZE = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 32}
WIDE = {  # rows of two groups, the last one short; experts that lie in several tensors; Conv1D stored as [in, out]
    "llama": lambda: transformers.LlamaConfig(hidden_size=160, intermediate_size=136, num_key_value_heads=2, **SIZE),
    "gpt2": lambda: transformers.GPT2Config(n_embd=160, n_layer=2, n_head=4, vocab_size=64, n_positions=32),
    "mixtral": lambda: transformers.MixtralConfig(
        hidden_size=160, intermediate_size=136, num_key_value_heads=2, num_local_experts=3, **SIZE
    ),
}


def save_wide(name: str, folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WIDE[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def by_the_page(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    """(dense tensors, records) of a sparse folder by docs/format.md: safetensors, json and numpy."""
    stored, records = plain(folder, "model.sparse*.safetensors"), {}
    for path in folder.glob("model.sparse*.safetensors"):
        with safe_open(path, "pt") as file:
            document = json.loads((file.metadata() or {}).get("gossamer", '{"format_version": 1, "matrices": {}}'))
        assert document["format_version"] == (2 if any("int8" in r for r in document["matrices"].values()) else 1)
        records |= document["matrices"]
    for key, record in records.items():
        bits, values = stored.pop(f"{key}_bitmask"), stored.pop(f"{key}_values")
        kept = np.unpackbits(bits.numpy(), axis=1, count=record["in"], bitorder="little").astype(bool)
        rows = torch.zeros(kept.shape, dtype=values.dtype)
        rows[torch.from_numpy(kept)] = values
        if "int8" in record:
            assert record["int8"]["group"] == 128
            dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[record["int8"]["dtype"]]
            rows = weights(rows.numpy(), stored.pop(f"{key}_scales").numpy(), dtype)
        *stack, a, b = record["shape"]
        stored[key] = rows.view(*stack, b, a).transpose(-1, -2) if record["transposed"] else rows.view(*stack, a, b)
    return stored, records


def records(folder: Path) -> tuple[int, dict[str, dict]]:
    with safe_open(folder / "model.sparse.safetensors", "pt") as file:
        document = json.loads(file.metadata()["gossamer"])
    return document["format_version"], document["matrices"]


def save_pair(folder: Path, name: str, dtype: torch.dtype) -> tuple[Path, Path]:
    """(sparse folder with float values, the same with int8 values) of `name` in WIDE; every second matrix is dense."""
    first = save_sparse(save_wide(name, folder / "base", dtype), folder / "floats", every=2)
    convert(first, folder / "int8", "sparse", values="int8")
    return first, folder / "int8"
