"""Counting zeros, parameters and bytes of a checkpoint, tensor by tensor, from its own files."""

from __future__ import annotations

from dataclasses import dataclass

from .format import INT8
from .source import TensorSource


@dataclass(frozen=True)
class TensorCount:
    """One tensor of a checkpoint. `stored_bytes` is what it takes in the sparse format when it has a mask.

    `values`: what kept weights are stored as, if not as floats of the tensor's dtype.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    zeros: int
    pattern: str | None
    masked_zeros: int | None
    dense_bytes: int
    stored_bytes: int
    values: str | None = None


def count_tensor(source: TensorSource, key: str) -> TensorCount:
    """Zeros of one tensor as written (a packed matrix is expanded), and its explicit mask's zeros."""
    meta = source.meta(key)
    tensor = source.read(key)
    mask = source.mask(key)
    size = tensor.numel()
    dense_bytes = size * tensor.element_size()
    stored = dense_bytes
    masked = None
    if mask is not None:
        masked = mask.zeros
        stored = mask.record.nbytes(meta.dtype)
    return TensorCount(
        key=key,
        shape=tuple(meta.shape),
        dtype=str(meta.dtype).removeprefix("torch."),
        size=size,
        zeros=size - int(tensor.count_nonzero()),
        pattern=None if mask is None else mask.pattern,
        masked_zeros=masked,
        dense_bytes=dense_bytes,
        stored_bytes=stored,
        values=INT8 if mask is not None and mask.record.int8 is not None else None,
    )


@dataclass(frozen=True)
class Census:
    """Totals over a checkpoint; "prunable" counts the tensors that hold prunable matrices, pruned or not."""

    parameters: int
    zeros: int
    prunable_parameters: int
    prunable_zeros: int
    dense_bytes: int
    stored_bytes: int
    masked_dense_bytes: int
    masked_stored_bytes: int

    @property
    def sparsity(self) -> float:
        """Zeros over all parameters."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def prunable_sparsity(self) -> float:
        """Zeros over the prunable parameters."""
        return self.prunable_zeros / self.prunable_parameters if self.prunable_parameters else 0.0


def census(source: TensorSource, prunable: set[str]) -> Census:
    """Count a checkpoint once, one tensor in memory at a time."""
    return total([count_tensor(source, key) for key in source.keys()], prunable)


def total(counts: list[TensorCount], prunable: set[str]) -> Census:
    """Totals of counted tensors. Integer and boolean tensors count as stored bytes, not as parameters."""
    weights = [count for count in counts if "float" in count.dtype]
    chosen = [count for count in weights if count.key in prunable]
    masked = [count for count in counts if count.masked_zeros is not None]
    return Census(
        parameters=sum(count.size for count in weights),
        zeros=sum(count.zeros for count in weights),
        prunable_parameters=sum(count.size for count in chosen),
        prunable_zeros=sum(count.zeros for count in chosen),
        dense_bytes=sum(count.dense_bytes for count in counts),
        stored_bytes=sum(count.stored_bytes for count in counts),
        masked_dense_bytes=sum(count.dense_bytes for count in masked),
        masked_stored_bytes=sum(count.stored_bytes for count in masked),
    )
