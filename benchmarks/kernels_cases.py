"""The contenders of `kernels.py`: one weight in every form, each with its bytes, its truth and its target.

All weights lie in the same kind of memory, large pages included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv.dispatch import bitmask_gemv, pack
from gossamer.kernels.channel_gemv.dispatch import channel_gemv, transpose
from gossamer.kernels.dense_gemv.dispatch import dense_gemv
from gossamer.kernels.dual_gemv import dispatch as dual
from gossamer.kernels.memory import empty_weight

# sparsity -> speedup over the best dense product that the kernels must reach
BITMASK = {0.5: 1.5, 0.7: 1.9, 0.8: 2.0}
CHANNEL = {0.5: 1.8, 0.65: 2.5, 0.8: 4.4}
DUAL = {0.5: 2.2}  # of weights and of inputs


@dataclass
class Case:
    """`call()` computes y [1, rows]; `bytes` of weight it has to read; `must`: the speedup it has to reach."""

    name: str
    call: Callable[[], Tensor]
    bytes: int
    x: Tensor
    weight: Tensor
    dense: bool = False
    must: float | None = None
    setting: Callable[[], AbstractContextManager[object]] = nullcontext

    def fault(self) -> str:
        """What is wrong with the result, or an empty text. Sums of `in` products in float32, one rounding."""
        with self.setting():
            y = self.call().double()
        wide, dense = self.x.double(), self.weight.double()
        truth, size = wide @ dense.t(), wide.abs() @ dense.abs().t()
        allowed = (self.x.shape[-1] + 8) * 2.0**-24 * size + torch.finfo(self.x.dtype).eps * truth.abs()
        worst = ((y - truth).abs() / allowed).nan_to_num(float("inf")).max().item()
        return "" if worst <= 1.0 else f"{worst:.1f} times the allowed error"


def cases(rows: int, cols: int) -> list[Case]:
    """All contenders of a random weight [rows, cols] and one row of x."""
    generator = torch.Generator().manual_seed(0)
    weight = empty_weight(rows, cols, dtype=torch.bfloat16).copy_(torch.randn(rows, cols, generator=generator))
    x = torch.randn(1, cols, generator=generator).bfloat16()
    masks = {f"{share:.0%}": torch.rand(rows, cols, generator=generator) >= share for share in BITMASK}
    found = _dense_cases(x, weight)
    for (name, mask), must in zip(masks.items(), BITMASK.values(), strict=True):
        found.append(_bitmask_case(f"bitmask {name}", x, weight, mask, must))
    order = torch.rand(rows, cols // 4, 4, generator=generator).argsort(-1).argsort(-1)
    found.append(_bitmask_case("bitmask 2:4", x, weight, (order < 2).view(rows, cols), BITMASK[0.5]))
    weight_t = transpose(weight)
    found += [_channel_case(x, weight, weight_t, share, must) for share, must in CHANNEL.items()]
    return found + [_dual_case(x, weight, masks[f"{share:.0%}"], share, must) for share, must in DUAL.items()]


def _dense_cases(x: Tensor, weight: Tensor) -> list[Case]:
    size, half_x = weight.nbytes, x.half()
    half = empty_weight(*weight.shape, dtype=torch.float16).copy_(weight)
    return [
        Case("torch bfloat16", lambda: F.linear(x, weight), size, x, weight, dense=True),
        Case("torch bfloat16, no oneDNN", lambda: F.linear(x, weight), size, x, weight, dense=True, setting=_no_onednn),
        Case("torch float16", lambda: F.linear(half_x, half), size, half_x, half, dense=True),
        Case("dense bfloat16", lambda: dense_gemv(x, weight), size, x, weight, dense=True),
    ]


def _bitmask_case(name: str, x: Tensor, weight: Tensor, mask: Tensor, must: float) -> Case:
    bits = bitmask.pack_bits(mask)
    packed = pack(bits, bitmask.compress(weight, bits), weight.shape[1])
    rows = weight.shape[0]
    return Case(name, lambda: bitmask_gemv(x, packed, rows), packed.nbytes, x, weight * mask, must=must)


def _dual_case(x: Tensor, weight: Tensor, mask: Tensor, share: float, must: float) -> Case:
    bits = bitmask.pack_bits(mask)
    packed = dual.pack(bits, bitmask.compress(weight, bits), weight.shape[1])
    threshold, kept = _skipped(x, share)
    read = packed.nbytes * int(kept.count_nonzero()) // x.shape[-1]
    call = lambda: dual.dual_gemv(x, packed, threshold, weight.shape[0])
    return Case(f"dual {share:.0%} x {share:.0%}", call, read, kept, weight * mask, must=must)


def _skipped(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A threshold that skips this share of x, and x without what it skips."""
    size = x.float().abs().flatten()
    threshold = torch.full_like(size, size.sort().values[round(share * len(size)) - 1].item())
    return threshold, torch.where(size > threshold, x, torch.zeros_like(x))


def _channel_case(x: Tensor, weight: Tensor, weight_t: Tensor, share: float, must: float) -> Case:
    threshold, kept = _skipped(x, share)
    read = int(kept.count_nonzero()) * weight.shape[0] * weight.element_size()
    call = lambda: channel_gemv(x, weight_t, threshold)
    return Case(f"activation-sparse {share:.0%}", call, read, kept, weight, must=must)


@contextmanager
def _no_onednn() -> Iterator[None]:
    """torch's own product for 16-bit floats, which oneDNN hides and which is often the faster one."""
    before = torch.backends.mkldnn.set_flags(False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(*before)
