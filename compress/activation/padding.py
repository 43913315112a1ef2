"""Which new tokens of a call are no padding, by whatever mask the call was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def real_tokens(mask: Any, positions: Any, batch: int, tokens: int, cached: int) -> Tensor | None:
    """bool [batch, tokens], or None where nothing says that any is padding.

    `mask`: [batch, all tokens], nonzero for real ones; [batch or 1, heads or 1, tokens, columns], of which a real token
    sees itself (0 in a float mask, nonzero in others), or several of these by the kind of layer. `positions`: position
    ids [batch or 1, tokens], asked where a mask has no column for each token itself. `cached`: tokens before these.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -tokens:].bool()
    if mask.dim() == 4 and mask.shape[2] == tokens and mask.shape[3] >= cached + tokens:
        own = mask[:, 0, :, cached : cached + tokens].diagonal(dim1=1, dim2=2)
        return (own == 0 if own.is_floating_point() else own.bool()).expand(batch, tokens)
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == tokens:
        return _rising(positions).expand(batch, tokens)
    return None


def _rising(positions: Tensor) -> Tensor:
    """Tokens that a position one higher follows, or one lower precedes: all padding has one position."""
    if positions.shape[1] == 1:
        return torch.ones_like(positions, dtype=torch.bool)
    step = positions.diff(dim=1) == 1
    edge = torch.zeros_like(step[:, :1])
    return torch.cat([step, edge], 1) | torch.cat([edge, step], 1)
