"""NaN and infinite weights, found before the work begins rather than in the block where they happen to be."""

from __future__ import annotations

import math

import torch

from ..errors import ModelError
from .progress import Progress
from .source import StoredSource

PIECE = 1 << 24  # bytes


def check_finite(source: StoredSource, progress: Progress) -> None:
    """Read every float tensor once, piece by piece. ModelError names the first that is not finite."""
    progress.working("look for NaN and infinite weights")
    for key in source.keys():
        meta = source.meta(key)
        if not meta.dtype.is_floating_point or not meta.shape:
            continue
        rows = meta.shape[0]
        step = max(1, PIECE * rows // max(1, math.prod(meta.shape) * meta.dtype.itemsize))
        if source.record(key) is not None:
            step = rows  # a packed matrix is unpacked as a whole whichever rows are asked for
        for start in range(0, rows, step):
            piece = source.read_rows(key, start, min(start + step, rows))
            if not bool(torch.isfinite(piece.float() if piece.itemsize == 1 else piece).all()):
                raise ModelError(
                    f"tensor {key} holds NaN or infinite values",
                    hint="the checkpoint is damaged: download it again, or repair it before compressing",
                )
