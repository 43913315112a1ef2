"""Dense matrix times 1 to 8 vectors: the public name. Compiled code on the CPU, plain torch elsewhere or without it."""

from __future__ import annotations

from torch import Tensor

from ..arguments import check_rows, check_weight
from ..backend import choose
from ..library import operator
from ..tier import current
from . import cpu, reference


def dense_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out] in x's dtype, sums in float32.

    x and weight: float32, bfloat16 or float16, of one dtype, contiguous, 1 to 8 rows of x. Raises KernelError otherwise
    and where a gradient would be needed. Infinities and NaN behave as in `torch.nn.functional.linear`.
    The same bits for any number of threads, and for a row alone or among others.
    """
    return _operator(x, weight)


def _run(x: Tensor, weight: Tensor) -> Tensor:
    code = check_weight(weight, "weight")
    rows = check_rows(x, weight.shape[1], weight.dtype, weight.device)
    tier = current() if x.is_cpu and choose("cpu") == "cpu" else None
    if tier is None:
        return reference.dense_gemv(x, weight)
    return cpu.dense_gemv(tier, x, rows, weight, code)


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_operator = operator("dense_gemv(Tensor x, Tensor weight) -> Tensor", _run, _fake)
