"""Masks from the zeros of a checkpoint that has none, for users who say that its zeros are pruned weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.bitmask.dispatch import pack_bits
from .blocks import StreamedModel
from .format import MatrixRecord, SourceMask, record_of
from .packing import as_integers, holds
from .source import FolderSource, TensorMeta

_PATTERNS = ("1:4", "2:4", "4:8")


class ZerosSource:
    """`base`, its prunable matrices masked where they are exactly +0.0.

    Only matrices that become smaller by packing get a mask. ModelError when the architecture is not known, because
    then nobody knows which axis of a tensor is the input.
    """

    def __init__(self, base: FolderSource, *, trust_remote_code: bool = False) -> None:
        self.base = base
        model = StreamedModel.open(base, base.folder, trust_remote_code=trust_remote_code)
        self._records: dict[str, MatrixRecord] = {}
        for index in range(model.num_blocks):
            for prunable in model.prunables(index):
                for piece in model.source_pieces(prunable):
                    if piece.key not in self._records and len(base.meta(piece.key).shape) in (2, 3):
                        self._add(piece.key, piece.transposed)

    def _add(self, key: str, transposed: bool) -> None:
        tensor = self.base.read(key)
        layout = MatrixRecord(tuple(tensor.shape), transposed, "", 0, "")
        kept = layout.as_rows(as_integers(tensor) != 0)
        bits = pack_bits(kept)
        saved = int((~kept).sum()) * tensor.element_size()
        if saved <= bits.numel():
            return
        record = record_of(bits, layout.shape, transposed=transposed, pattern=_pattern(layout, kept))
        self._records[key] = record

    def keys(self) -> list[str]:
        return self.base.keys()

    def meta(self, key: str) -> TensorMeta:
        return self.base.meta(key)

    def read(self, key: str) -> Tensor:
        return self.base.read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self.base.read_rows(key, start, stop)

    def record(self, key: str) -> MatrixRecord | None:
        return self._records.get(key)

    def records(self) -> dict[str, MatrixRecord]:
        return {key: self._records[key] for key in self.keys() if key in self._records}

    def bits(self, key: str) -> Tensor:
        return pack_bits(self._records[key].as_rows(as_integers(self.base.read(key)) != 0))

    def values(self, key: str) -> Tensor | None:
        return None

    def scales(self, key: str) -> Tensor | None:
        return None

    def mask(self, key: str) -> SourceMask | None:
        record = self.record(key)
        return None if record is None else SourceMask(self.bits(key), record)

    def chunks(self, key: str) -> Iterator[Tensor]:
        return self.base.chunks(key)

    def nbytes(self) -> int:
        return self.base.nbytes()

    def digest(self) -> str:
        return self.base.digest()


def _pattern(layout: MatrixRecord, kept: Tensor) -> str:
    """The tightest common N:M that the zeros have, else the sparsity."""
    for pattern in _PATTERNS:
        if holds(MatrixRecord(layout.shape, layout.transposed, pattern, 0, ""), kept):
            return pattern
    return repr(round(float((~kept).to(torch.float64).mean()), 6))
