"""Part files: what one block (or the head) becomes, in the final packed form, durable before the journal says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..blocks import Exported
from ..format import PackedTensor, pack
from ..writer import write_part


def part_path(folder: Path, index: int) -> Path:
    """The part of block `index`."""
    return folder / f"block-{index:05d}.safetensors"


def head_path(folder: Path) -> Path:
    """The part of the output matrix."""
    return folder / "head.safetensors"


def write_exported(path: Path, exported: Iterable[Exported], patterns: Mapping[str, str]) -> None:
    """Write exported tensors, packed where they have a mask. `patterns`: checkpoint key -> what its mask promises."""
    dense: dict[str, Tensor] = {}
    packed: dict[str, PackedTensor] = {}
    for item in exported:
        if item.mask is None:
            dense[item.key] = item.tensor
        else:
            packed[item.key] = pack(item.tensor, item.mask, pattern=patterns[item.key], transposed=item.transposed)
    write_part(path, dense, packed)
