"""Shapes by name: the matrices of one decoder block, out x in, each shape once."""

from __future__ import annotations

import re

from ...errors import RecipeError

Shape = tuple[int, int]


def _block(width: int, mlp: int, kv: int | None = None, heads: int | None = None) -> tuple[Shape, ...]:
    """q, k and v, o, gate and up, down. `kv`: outputs of k and of v; `heads`: outputs of q, where not the width."""
    queries = heads or width
    found = [(queries, width), (kv or queries, width), (width, queries), (mlp, width), (width, mlp)]
    return tuple(dict.fromkeys(found))


SETS: dict[str, tuple[Shape, ...]] = {
    "llama-3-8b": _block(4096, 14336, kv=1024),
    "llama-3.2-1b": _block(2048, 8192, kv=512),
    "llama-3.2-3b": _block(3072, 8192, kv=1024),
    "llama-2-7b": _block(4096, 11008),
    "llama-2-13b": _block(5120, 13824),
    "tinyllama-1.1b": _block(2048, 5632, kv=256),
    "mistral-7b": _block(4096, 14336, kv=1024),
    "qwen2-0.5b": _block(896, 4864, kv=128),
    "qwen2-7b": _block(3584, 18944, kv=512),
    "gemma-2-2b": _block(2304, 9216, kv=1024, heads=2048),
}


def parse(text: str) -> list[Shape]:
    """`4096x4096,llama-3-8b` as shapes, each once, in order. Raises RecipeError for anything else."""
    found: list[Shape] = []
    for word in text.split(","):
        name = word.strip().lower()
        match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", name)
        if match is None and name not in SETS:
            raise RecipeError(
                f"shape {word.strip()!r} is unknown; allowed: OUTxIN with whole numbers from 1 on, {', '.join(SETS)}",
                hint="write for example 4096x4096,1024x4096 or llama-3-8b",
            )
        found += SETS[name] if match is None else [(int(match[1]), int(match[2]))]
    return list(dict.fromkeys(found))
