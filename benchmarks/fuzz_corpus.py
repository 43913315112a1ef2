"""Packed matrices of real checkpoints as files, for the fuzz driver of kernels/csrc/fuzz.

    python benchmarks/fuzz_corpus.py FOLDER_OR_FILE... --out build/corpus
    make fuzz FUZZ_CORPUS="build/corpus/*"

Takes the first rows of every matrix: of sparse checkpoints with their own masks, of dense ones with the larger half of
each row. Other dtypes become bfloat16. The word before the first dot of a file's name is the driver's target.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gossamer.compress.table import TensorTable, open_files
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv.dispatch import pack
from gossamer.kernels.bitmask_gemv.layout import CODES

ROWS = 40
MOST = 100  # files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="folders with safetensors files, or such files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the corpus")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of every matrix")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    count = 0
    for path in options.checkpoints:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        for packed in matrices(open_files(files), options.rows):
            if count == MOST:
                break
            (options.out / f"tiles.{count:03d}").write_bytes(packed.numpy().tobytes())
            count += 1
    print(f"{count} packed matrices in {options.out}")


def matrices(table: TensorTable, rows: int) -> Iterator[Tensor]:
    """The first `rows` rows of every matrix, packed."""
    for key in table.keys():
        record = table.record(key)
        if record is not None:
            bits = table.bits(key)[:rows].contiguous()
            yield pack(bits, half(table.values(key)[: int(bitmask.row_counts(bits).sum())]), record.cols)
        elif len(table.meta(key).shape) == 2:
            weight = table.read_rows(key, 0, min(rows, table.meta(key).shape[0]))
            if weight.is_floating_point():
                yield pack(*halved(half(weight)), weight.shape[1])


def halved(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bits, values) of the larger half of each row, ties to the lower column."""
    order = weight.float().abs().argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, order[:, : -(-weight.shape[1] // 2)], True)
    bits = bitmask.pack_bits(mask)
    return bits, bitmask.compress(weight, bits)


def half(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in CODES else tensor.to(torch.bfloat16)


if __name__ == "__main__":
    main()
