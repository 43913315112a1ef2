"""`active_gemv` for GPUs: active inputs are listed once, then product after product. `dispatch` has checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..channel_gemv import triton as channel
from ..dual_gemv import triton as dual
from ..dual_gemv.dispatch import unpack
from ..dual_gemv.gpu_layout import matrix_of
from ..dual_gemv.record import record_of
from ..gpu import on_device


def active_gemv(
    x: Tensor,
    threshold: Tensor,
    weights: Sequence[Tensor],
    outputs: Sequence[int],
    biases: Sequence[Tensor | None],
) -> tuple[list[Tensor], int | Tensor]:
    """The products, and how many inputs were read: int32 [1] on the GPU."""
    batch = x.shape[:-1].numel()
    if not x.shape[-1]:
        return [channel.empty_sum(x, count, bias) for count, bias in zip(outputs, biases, strict=True)], 0
    with on_device(x):
        listed = channel.list_active(x, batch, threshold)
    results = []
    for weight, count, bias in zip(weights, outputs, biases, strict=True):
        if weight.dtype.is_floating_point:
            results.append(channel.channel_gemv(x, batch, weight, threshold, bias, listed))
        else:
            matrix = matrix_of(weight, record_of(weight), unpack)
            results.append(dual.dual_gemv(x, batch, matrix, threshold, count, bias, listed))
    return results, listed.number
