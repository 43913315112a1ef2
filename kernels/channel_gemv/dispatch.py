"""Activation-sparse product: the public names. Compiled code, Triton on GPUs, plain torch without either."""

from __future__ import annotations

from torch import Tensor

from ...errors import KernelError
from ..active import cpu
from ..arguments import check_bias, check_rows, check_threshold, check_weight
from ..backend import choose
from ..library import operator
from ..memory import empty_weight
from ..tier import current
from . import reference


def transpose(weight: Tensor) -> Tensor:
    """weight [out, in] on the CPU as weight_t [in, out], in memory of its own; `.t()` of the result gives it back."""
    if weight.dim() != 2 or not weight.is_cpu:
        raise KernelError(f"weight has shape {list(weight.shape)} on {weight.device}, it must be a matrix on the CPU")
    return empty_weight(*reversed(weight.shape), dtype=weight.dtype).copy_(weight.detach().t())


def channel_gemv(x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight_t [in, out] over the active inputs only: [..., out] in x's dtype, sums in float32.

    Input i of a row is active unless |x_i| <= threshold_i (float32 [in]; negative: always, infinite: only NaN).
    Sums begin at `bias` [out], in the dtype of x, or at zero.
    A row of weight_t is read when any row of x needs it; the others keep their own zeros. On the CPU a row gives the
    same bits alone and among others, and for any number of threads; on a GPU the same call gives the same bits. x and
    weight_t: float32, bfloat16 or float16, of one dtype, contiguous, 1 to 8 rows of x. Raises KernelError otherwise and
    where a gradient would be needed.

    NaN in x is always active. Weights should be finite: an infinite or NaN weight that is read for one row makes NaN of
    all rows.
    """
    return _operator(x, weight_t, threshold, bias)


def _run(x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    check_weight(weight_t, "weight_t")
    channels = weight_t.shape[0]
    rows = check_rows(x, channels, weight_t.dtype, weight_t.device)
    check_threshold(threshold, channels, x.device)
    check_bias(bias, weight_t.shape[1], x)
    which = choose(x.device.type)
    if which == "triton":
        from . import triton

        return triton.channel_gemv(x, rows, weight_t, threshold, bias)
    tier = current() if which == "cpu" else None
    if tier is None:
        return reference.channel_gemv(x, weight_t, threshold, bias)
    return cpu.active_gemv(tier, x, threshold, [weight_t], [weight_t.shape[1]], [bias])[0][0]


def _fake(x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


_operator = operator(
    "channel_gemv(Tensor x, Tensor weight_t, Tensor threshold, Tensor? bias=None) -> Tensor", _run, _fake
)
