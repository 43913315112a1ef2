"""What the kept weights of a checkpoint are stored as: their own floats, or int8 with scales (kernels/int8).

A source is seen through one of these; nothing is kept, so a matrix is rounded anew whenever it is read, and always to
the same values. Rounding does not look at calibration data: a solver that chooses values for the layer's output would
put them into the parts of the prune stage instead, and this view would pass them on as it does with int8 sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from ..errors import CheckpointError, KernelError
from ..kernels.bitmask.dispatch import compress, expand
from ..kernels.int8.dispatch import dequantise, group_scales, quantise
from .format import MatrixRecord, SourceMask
from .packing import packed_values
from .source import StoredSource, TensorMeta
from .table import byte_view

KINDS = ("same", "int8")


def with_values(source: StoredSource, kind: str) -> StoredSource:
    """`source` with the kept weights of every masked matrix as `kind`; all other tensors are as they were.

    "same": floats of the matrix' own dtype, int8 values multiplied out. "int8": rounded to int8 values, which loses
    precision; matrices that have int8 values keep them bit for bit.
    """
    if kind not in KINDS:
        raise ValueError(f"values {kind!r}; allowed: {', '.join(KINDS)}")
    return Int8Source(source) if kind == "int8" else FloatSource(source)


class _View:
    """A StoredSource over `base`; the children say what a matrix with a mask becomes."""

    def __init__(self, base: StoredSource) -> None:
        self.base = base

    def keys(self) -> list[str]:
        return self.base.keys()

    def meta(self, key: str) -> TensorMeta:
        return self.base.meta(key)

    def records(self) -> dict[str, MatrixRecord]:
        return {key: self._record(key, record) for key, record in self.base.records().items()}

    def record(self, key: str) -> MatrixRecord | None:
        record = self.base.record(key)
        return None if record is None else self._record(key, record)

    def bits(self, key: str) -> Tensor:
        return self.base.bits(key)

    def mask(self, key: str) -> SourceMask | None:
        record = self.record(key)
        return None if record is None else SourceMask(self.bits(key), record)

    def read(self, key: str) -> Tensor:
        return self.base.read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        if self.base.record(key) is None:
            return self.base.read_rows(key, start, stop)
        return self.read(key)[start:stop].clone()

    def chunks(self, key: str) -> Iterator[Tensor]:
        if self.base.record(key) is None:
            yield from self.base.chunks(key)
        else:
            yield byte_view(self.read(key))

    def nbytes(self) -> int:
        return self.base.nbytes()

    def _record(self, key: str, record: MatrixRecord) -> MatrixRecord:
        raise NotImplementedError


class FloatSource(_View):
    """Every matrix with float values."""

    def values(self, key: str) -> Tensor | None:
        scales = self.base.scales(key)
        if scales is None:
            return self.base.values(key)
        record = self.base.record(key)
        assert record is not None
        return compress(record.as_rows(self.base.read(key)), self.base.bits(key))

    def scales(self, key: str) -> Tensor | None:
        return None

    def digest(self) -> str:
        return self.base.digest()

    def _record(self, key: str, record: MatrixRecord) -> MatrixRecord:
        return record.with_floats()


class Int8Source(_View):
    """Every matrix that has a mask with int8 values, and read as what these values give."""

    def read(self, key: str) -> Tensor:
        record = self.record(key)
        if record is None or self._is_int8(key):
            return self.base.read(key)
        assert record.int8 is not None
        bits = self.bits(key)
        values, scales = self._quantised(key, bits)
        return record.from_rows(dequantise(values, scales, bits, record.cols, record.int8))

    def values(self, key: str) -> Tensor | None:
        if self.base.record(key) is None or self._is_int8(key):
            return self.base.values(key)
        return self._quantised(key, self.bits(key))[0]

    def scales(self, key: str) -> Tensor | None:
        if self.base.record(key) is None or self._is_int8(key):
            return self.base.scales(key)
        bits = self.bits(key)
        with _naming(key):
            return group_scales(self._rows(key, bits), bits)

    def digest(self) -> str:
        return f"{self.base.digest()} int8"

    def _record(self, key: str, record: MatrixRecord) -> MatrixRecord:
        return record if record.int8 is not None else replace(record, int8=self.base.meta(key).dtype)

    def _is_int8(self, key: str) -> bool:
        record = self.base.record(key)
        return record is not None and record.int8 is not None

    def _quantised(self, key: str, bits: Tensor) -> tuple[Tensor, Tensor]:
        with _naming(key):
            return quantise(self._rows(key, bits), bits)

    def _rows(self, key: str, bits: Tensor) -> Tensor:
        """The matrix as rows, after the check that nothing is lost with what the mask drops."""
        record = self.base.record(key)
        assert record is not None
        return expand(packed_values(self.base, key), bits, record.cols)


@contextmanager
def _naming(key: str) -> Iterator[None]:
    """What int8 values cannot hold, said of the tensor."""
    try:
        yield
    except KernelError as error:
        raise CheckpointError(f"tensor {key} cannot have int8 values: {error.message}", hint=error.hint) from error
