"""Dense products: three of torch, and our own. Speedups refer to the fastest of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import name
from ..dense_gemv.dispatch import dense_gemv
from ..memory import empty_weight
from .case import Case

_SHARE = {(4096, 4096): 0.9}  # shape -> share of the read bandwidth that our own must reach


def dense_cases(x: Tensor, weight: Tensor) -> list[Case]:
    """All dense products of one weight; those of torch in bfloat16 and float16, ours in the weight's dtype.

    The copies lie in the same kind of memory as the weight, large pages included.
    """
    wide_x, wide = x.bfloat16(), _as(weight, torch.bfloat16)
    half_x, half = x.half(), _as(weight, torch.float16)
    plain = lambda: F.linear(wide_x, wide)
    return [
        Case("torch bfloat16", plain, wide.nbytes, wide_x, wide, dense=True),
        Case("torch bfloat16, no oneDNN", plain, wide.nbytes, wide_x, wide, dense=True, setting=_no_onednn),
        Case("torch float16", lambda: F.linear(half_x, half), half.nbytes, half_x, half, dense=True),
        dense_case(x, weight),
    ]


def dense_case(x: Tensor, weight: Tensor) -> Case:
    """Our own dense kernel: the baseline, and what runs where sparsity does not pay."""
    share = _SHARE.get((weight.shape[0], weight.shape[1]))
    call = lambda: dense_gemv(x, weight)
    return Case(f"dense {name(x.dtype)}", call, weight.nbytes, x, weight, dense=True, must=1.0, must_share=share)


def _as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype is dtype else empty_weight(*weight.shape, dtype=dtype).copy_(weight)


@contextmanager
def _no_onednn() -> Iterator[None]:
    """torch's own product for 16-bit floats, which oneDNN hides and which is often the faster one."""
    before = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(*before)
