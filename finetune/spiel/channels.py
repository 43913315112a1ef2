"""Squares per channel of a layer, outputs [out] and inputs [in]: of the two factors of gradients gy^T x, summed over
tokens, or of rows and columns of the gradients themselves.

They lie among the tensors of a tracker: "rows" and "cols" of finished updates as they were applied, "now_rows" and
"now_cols" of the one under way as it is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.entries.dispatch import channel_squares


def start(rows: int, cols: int, device: torch.device) -> dict[str, Tensor]:
    """Zeros, float32."""
    sizes = {"rows": rows, "cols": cols, "now_rows": rows, "now_cols": cols}
    return {name: torch.zeros(size, device=device) for name, size in sizes.items()}


def add(tensors: dict[str, Tensor], gy: Tensor, x: Tensor) -> None:
    """One backward pass, with factors [tokens, out] and [tokens, in]."""
    tensors["now_rows"] += gy.to(torch.float32).square().sum(0)
    tensors["now_cols"] += x.to(torch.float32).square().sum(0)


def add_block(tensors: dict[str, Tensor], first_row: int, block: Tensor) -> None:
    """Rows of a gradient."""
    rows, cols = channel_squares(block)
    tensors["now_rows"][first_row : first_row + len(block)] += rows
    tensors["now_cols"] += cols


def forget(tensors: dict[str, Tensor]) -> None:
    """The update that is under way does not count."""
    tensors["now_rows"].zero_()
    tensors["now_cols"].zero_()


def so_far(tensors: dict[str, Tensor], row_scale: float, col_scale: float) -> tuple[Tensor, Tensor]:
    """(rows, cols) with the update under way, whose values count so many times."""
    return tensors["rows"] + tensors["now_rows"] * row_scale**2, tensors["cols"] + tensors["now_cols"] * col_scale**2


def fold(tensors: dict[str, Tensor], row_scale: float, col_scale: float) -> None:
    """The update is finished."""
    tensors["rows"], tensors["cols"] = so_far(tensors, row_scale, col_scale)
    forget(tensors)
