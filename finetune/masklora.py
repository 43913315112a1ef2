"""MaskLoRA: a low-rank update of a sparse weight that keeps its zeros, trained and merged as one and the same matrix.

    W' = W + (alpha / rank) * M . (B A)         W, M [out, in], B [out, rank] (zeros), A [rank, in]

Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs" (arXiv 2312.15230). M is the explicit
mask, not W != 0. Written out, B A is a dense temporary for every layer that autograd would keep until the backward
pass; here tiles of rows of W' are made when they are needed, in both passes, and thrown away at once: only the input is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TrainingError

TILE = 2**20  # entries of W' that exist at once


class _Masked(torch.autograd.Function):
    """y = x W'^T. Saves x, W, M, A and B alone; the backward pass makes the tiles of W' again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, mask: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mask, down, up)
        ctx.scale = scale
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows in _tiles(weight):
            y[..., rows] = x @ _tile(weight, mask, down, up, scale, rows, x.dtype).t()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mask, down, up = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, weight.shape[0])
        to_x = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        to_down, to_up = torch.zeros_like(down, dtype=torch.float32), torch.empty_like(up, dtype=torch.float32)
        for rows in _tiles(weight):
            part = grad[:, rows]
            if to_x is not None:
                to_x += part @ _tile(weight, mask, down, up, ctx.scale, rows, x.dtype)
            product = (part.t() @ flat).float().mul_(ctx.scale)
            if mask is not None:
                product.masked_fill_(~mask[rows], 0.0)
            to_up[rows] = product @ down.float().t()
            to_down += up[rows].float().t() @ product
        to_x = None if to_x is None else to_x.reshape(x.shape)
        return to_x, None, None, to_down.to(down.dtype), to_up.to(up.dtype), None


class MaskLoRALinear(nn.Module):
    """Stands in for a Linear (or GPT-2's Conv1D, whose weight is [in, out]) while it is trained.

    Args:
        base: the map; its weight is frozen, its bias stays as trainable as it was.
        mask: bool in the shape of `base.weight`, True = kept; None for a dense weight, which makes it plain LoRA.
        rank: columns of B. alpha: the update is multiplied by alpha / rank.
        generator: draws A; B starts at zero, so that nothing changes before the first step.
    """

    mask: Tensor | None

    def __init__(
        self, base: nn.Module, mask: Tensor | None, rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        weight = self.weight
        self.register_buffer("mask", None if mask is None else mask.to(weight.device), persistent=False)
        bound = 1 / math.sqrt(weight.shape[1])
        drawn = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(drawn.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        self._base_weight.requires_grad_(False)

    @property
    def _base_weight(self) -> Tensor:
        return self.base.get_parameter("weight")

    @property
    def _transposed(self) -> bool:
        return not isinstance(self.base, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """W, [out, in]: a view of what the base holds."""
        return self._base_weight.t() if self._transposed else self._base_weight

    def _mask(self) -> Tensor | None:
        return self.mask.t() if self.mask is not None and self._transposed else self.mask

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast where that is on, else in the weight's."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._base_weight.dtype
        y = _Masked.apply(x.to(dtype), self.weight, self._mask(), self.down, self.up, self.scale)
        bias = getattr(self.base, "bias", None)
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The base with W' as its weight, summed in float32 and rounded once; pruned entries are +0.0."""
        weight, mask = self.weight, self._mask()
        for rows in _tiles(weight):
            tile = _tile(weight, mask, self.down, self.up, self.scale, rows, torch.float32)
            weight[rows] = (tile if mask is None else tile.masked_fill(~mask[rows], 0.0)).to(weight.dtype)
        return self.base


def wrap(
    model: nn.Module,
    targets: Iterable[str],
    masks: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    seed: int = 0,
) -> list[str]:
    """Replace the maps whose weights are `targets` (parameter names); the names of the wrapped modules.

    Raises:
        TrainingError: none of them is a Linear or Conv1D (fused experts have no module of their own).
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    wrapped = []
    for name in targets:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf != "weight" or module.get_parameter("weight").dim() != 2:
            continue
        model.set_submodule(path, MaskLoRALinear(module, masks.get(name), rank, alpha, generator))
        wrapped.append(path)
    if not wrapped:
        raise TrainingError(
            "no matrix can carry a low-rank update: all of them are fused expert parameters",
            hint="use --method full or bias-norm",
        )
    return wrapped


def unwrap(model: nn.Module, names: Iterable[str]) -> None:
    """Merge every wrapped module and put its base back."""
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, MaskLoRALinear)
        model.set_submodule(name, module.merge())


def _tiles(weight: Tensor) -> Iterable[slice]:
    rows, cols = weight.shape
    step = max(1, TILE // cols)
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _tile(
    weight: Tensor, mask: Tensor | None, down: Tensor, up: Tensor, scale: float, rows: slice, dtype: torch.dtype
) -> Tensor:
    """Rows of W', [rows, in], summed in float32 and rounded to `dtype`."""
    update = functional.linear(up[rows].float(), down.float().t()).mul_(scale)
    if mask is not None:
        update.masked_fill_(~mask[rows], 0.0)
    return update.add_(weight[rows]).to(dtype)
