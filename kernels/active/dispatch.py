"""Several matrices that skip the same inputs of 1 to 8 vectors: query, key and value of one input, or gate and up.

The same bits as `channel_gemv` and `dual_gemv` one after the other; what is saved is the way from Python to the threads
and back, and looking for the active inputs more than once. It also says how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import KernelError
from ..arguments import check_bias, check_rows, check_threshold, check_weight
from ..backend import choose
from ..channel_gemv import reference as channel
from ..dual_gemv import reference as dual
from ..dual_gemv.record import record_of
from ..tier import current
from . import cpu


def active_gemv(
    x: Tensor,
    threshold: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    center: Tensor | None = None,
) -> tuple[list[Tensor], int | Tensor]:
    """x [..., in] times each of `weights` over the active inputs only: [..., out] in x's dtype, and how many were read.

    A weight is W^T [in, out] of `channel_gemv` or a packed tensor of `dual_gemv` (uint8), all of x's dtype and number
    of inputs, with a bias [out] in x's dtype or None: sums begin there, in float32. `center`, float32 [in], is taken
    off x first, rounded to x's dtype. Of several rows, an input counts as read when any row needs it. On GPUs the
    number is a tensor int32 [1], which nobody has waited for. No operator of torch: inside torch.compile call the
    single ones. Raises KernelError as they do.
    """
    outputs = check(x, threshold, weights, biases, center)
    which = choose(x.device.type)
    tier = current() if which == "cpu" else None
    if tier is not None:
        return cpu.active_gemv(tier, x, threshold, weights, outputs, biases, center)
    x = x if center is None else (x.float() - center).to(x.dtype)
    if which == "triton":
        from . import triton

        return triton.active_gemv(x, threshold, weights, outputs, biases)
    rows = channel.active(x, threshold).reshape(x.shape[:-1].numel(), x.shape[-1])
    results = [_single(x, threshold, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return results, int(rows.any(0).count_nonzero())


def check(
    x: Tensor,
    threshold: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    center: Tensor | None,
) -> list[int]:
    """Outputs of each weight. Raises KernelError for what `active_gemv` does not take."""
    outputs = [_outputs(x, weight) for weight in weights]
    if not outputs or len(biases) != len(weights):
        raise KernelError(f"{len(weights)} matrices with {len(biases)} biases; at least one, and as many")
    for bias, count in zip(biases, outputs, strict=True):
        check_bias(bias, count, x)
    check_threshold(threshold, x.shape[-1], x.device)
    if center is not None:
        check_threshold(center, x.shape[-1], x.device, "center")
    return outputs


def _outputs(x: Tensor, weight: Tensor) -> int:
    """Outputs of a weight that fits x."""
    if weight.dtype.is_floating_point:
        check_weight(weight, "weight_t")
        check_rows(x, weight.shape[0], weight.dtype, weight.device)
        return weight.shape[1]
    record = record_of(weight)
    check_rows(x, record.cols, record.dtype, record.device)
    return record.rows


def _single(x: Tensor, threshold: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    run = channel.channel_gemv if weight.dtype.is_floating_point else dual.dual_gemv
    return run(x, weight, threshold, bias)
