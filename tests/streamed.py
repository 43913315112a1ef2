"""A StreamedModel over a folder, and two windows of tokens at its first block."""

from __future__ import annotations

from pathlib import Path

import torch
from families import VOCAB, FolderTensors

from gossamer.compress.blocks import StreamedModel


def open_model(folder: Path, **options) -> StreamedModel:
    return StreamedModel.open(FolderTensors(folder), folder, **options)


def ids(n: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(1))


def captured(model: StreamedModel, n: int = 2):
    hidden: dict[int, torch.Tensor] = {}
    return model.capture(ids(n), hidden.__setitem__), hidden
