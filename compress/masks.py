"""The masks of a checkpoint seen as a model: every weight is 1 where it is kept and 0 where it is pruned.

Loaded through the same conversion as the weights (fused experts, transposed layouts), so that a stage gets the masks it
must respect in the same [out, in] view as the matrices themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .source import TensorMeta, TensorSource


class MaskSource:
    """A TensorSource over `inner` that returns masks as 0/1 tensors, and ones for tensors without a mask."""

    def __init__(self, inner: TensorSource) -> None:
        self.inner = inner

    def keys(self) -> list[str]:
        return self.inner.keys()

    def meta(self, key: str) -> TensorMeta:
        return self.inner.meta(key)

    def read(self, key: str) -> Tensor:
        meta = self.inner.meta(key)
        dtype = meta.dtype if meta.dtype.is_floating_point else torch.float32
        mask = self.inner.mask(key)
        return torch.ones(meta.shape, dtype=dtype) if mask is None else mask.to_bool().to(dtype)

    def mask(self, key: str) -> None:
        return None

    def digest(self) -> str:
        return self.inner.digest()

    def nbytes(self) -> int:
        return self.inner.nbytes()
