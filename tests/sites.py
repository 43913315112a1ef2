"""Inputs and weights of one small block, and core neurons of a small MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.activation_sparsity.base import CoreNeurons, MLPParts
from gossamer.activation_sparsity.method import BlockData, Extent, Site

TOKENS, WIDTH, OUT = 300, 24, 40
PARTS = MLPParts("mlp.gate", "mlp.up", "mlp.down", "silu", 6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def extent(site: Site) -> Extent:
    return Extent(site.size, 0, 0, site.size)


def block(site: Site) -> BlockData:
    return BlockData(0, [site], {})


def core(keep: int = 2, clusters: Tensor | None = None) -> CoreNeurons:
    return CoreNeurons(PARTS, keep, torch.tensor([1.0, 1.0, 10.0, 1.0, 1.0, 1.0]), clusters)
