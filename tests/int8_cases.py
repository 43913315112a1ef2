"""int8 values and their scales by numpy, group by group: the reference of the tests."""

from __future__ import annotations

import numpy as np
import torch

GROUP = 128


def quantised(weight: torch.Tensor, kept: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [r, c] with 0 where nothing is kept, float16 scales [r, groups]) of a weight [r, c] and its bool mask."""
    rows, cols = weight.shape
    most_scale = np.float16(515.5) if weight.dtype == torch.float16 else np.float16(65504)
    w = np.where(kept.numpy(), weight.float().numpy(), np.float32(0))
    codes = np.zeros((rows, cols), np.int8)
    scales = np.zeros((rows, -(-cols // GROUP)), np.float16)
    for r in range(rows):
        for g in range(scales.shape[1]):
            group = w[r, g * GROUP : (g + 1) * GROUP]
            wanted = np.abs(group).max() / np.float32(127)
            scale = np.float16(wanted)
            if np.float32(scale) < wanted:
                scale = np.nextafter(scale, np.float16(np.inf))
            scales[r, g] = scale = min(scale, most_scale)
            if scale:
                codes[r, g * GROUP : (g + 1) * GROUP] = np.rint(group / np.float32(scale))
    return codes, scales


def weights(codes: np.ndarray, scales: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """dtype [r, c] of int8 values in their places: exact in float64, rounded once by way of float32, which holds it."""
    exact = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), GROUP, 1)[:, : codes.shape[1]]
    single = exact.astype(np.float32)
    assert np.array_equal(single.astype(np.float64), exact)
    return torch.from_numpy(single + np.float32(0)).to(dtype)
