"""Pruned matrices back into the checkpoint's own tensors: same keys, shapes, orientation and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .keymap import KeyMap, Piece, Tensors
from .prunable import Prunable, matrix_of, owner_of, stored_transposed


@dataclass(frozen=True)
class Exported:
    """A tensor for the checkpoint, under the source's key, in its shape, orientation and dtype.

    `mask`: True = kept, shaped like `tensor`; None when only weights changed. `transposed`: its matrices are [in, out].
    """

    key: str
    tensor: torch.Tensor
    mask: torch.Tensor | None
    transposed: bool


class Exporter:
    """Reverses the loading of whole conversion groups, for weights and for masks alike."""

    def __init__(self, model: Any, keys: KeyMap, source: Tensors) -> None:
        self._model = model
        self._keys = keys
        self._source = source

    def pieces(self, prunable: Prunable) -> list[Piece]:
        """The source tensors that hold `prunable`."""
        owner = self._model.get_submodule(prunable.parameter.rpartition(".")[0])
        pieces = self._keys.pieces(prunable.parameter, transposed=stored_transposed(prunable, owner))
        return [p for p in pieces if p.experts is None or prunable.expert is None or prunable.expert in p.experts]

    def export(
        self, root: nn.Module, path: str, prunables: list[Prunable], masks: Mapping[str, torch.Tensor | None]
    ) -> list[Exported]:
        """Tensors that hold one of `prunables`. `root`: the loaded module called `path`. Pruned entries are +0.0."""
        by_group: dict[int, list[Prunable]] = {}
        for prunable in prunables:
            by_group.setdefault(id(self._keys.groups[prunable.parameter]), []).append(prunable)
        return [item for members in by_group.values() for item in self._group(root, path, members, masks)]

    def _group(
        self, root: nn.Module, path: str, members: list[Prunable], masks: Mapping[str, torch.Tensor | None]
    ) -> Iterator[Exported]:
        targets = self._keys.groups[members[0].parameter].targets
        weights = {t: root.get_parameter(t.removeprefix(f"{path}.")).data for t in targets}
        kept = {t: torch.ones(w.shape, dtype=torch.bool) for t, w in weights.items()}
        transposed: dict[str, bool] = {}
        masked: set[str] = set()
        for p in members:
            pieces = self.pieces(p)
            transposed.update({piece.key: piece.transposed for piece in pieces})
            mask = masks[p.name]
            if mask is not None:
                _check_mask(p, mask)
                matrix_of(kept[p.parameter], p, owner_of(root, path, p)).copy_(mask)
                masked.update(piece.key for piece in pieces)
        tensors = self._keys.revert(weights)
        bits = self._keys.revert(kept) if masked else {}
        for key, swapped in transposed.items():
            meta = self._source.meta(key)
            if tuple(tensors[key].shape) != tuple(meta.shape):
                raise ModelError(
                    f"{key} would change its shape from {tuple(meta.shape)} to {tuple(tensors[key].shape)}"
                )
            yield exported(key, tensors[key].to("cpu", meta.dtype), bits[key] if key in masked else None, swapped)


def exported(key: str, tensor: torch.Tensor, mask: torch.Tensor | None, transposed: bool) -> Exported:
    """`tensor` with +0.0 where `mask` (same orientation) is False."""
    if mask is None:
        return Exported(key, tensor.contiguous(), None, transposed)
    mask = mask.cpu().contiguous()
    return Exported(key, tensor.masked_fill(~mask, 0.0).contiguous(), mask, transposed)


def _check_mask(prunable: Prunable, mask: torch.Tensor) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != prunable.shape:
        raise ValueError(f"mask of {prunable.name}: bool {prunable.shape} needed, got {mask.dtype} {tuple(mask.shape)}")
