"""What the tests of all matrix-vector operations share: back ends, exact integer matrices, bounds on rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor

from gossamer.kernels import tier

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]
BATCHES = [1, 2, 3, 5, 8]
BACKENDS = ["torch", *tier.NAMES]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the block on one tier or in plain torch, on one thread; skips where processor or build lack the tier."""
    if name != "torch" and name not in tier.available():
        pytest.skip(f"no tier {name} here")
    with tier.forced(None if name == "torch" else name), threads(1):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def integers(*shape: int, dtype: torch.dtype, seed: int, zeros: float = 0.0) -> Tensor:
    """Whole numbers from -7 to 7 without 0, and a share of zeros. Their sums of products are exact in float32."""
    return _integers(shape, seed, zeros).to(dtype, copy=True)


@cache
def _integers(shape: tuple[int, ...], seed: int, zeros: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 8, shape, generator=generator) * (2 * torch.randint(0, 2, shape, generator=generator) - 1)
    return (values * (torch.rand(shape, generator=generator) >= zeros)).float()


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T of `integers`, whose sums float32 holds exactly in any order, rounded once to x's dtype."""
    return (x.float() @ weight.float().t()).to(x.dtype)


def assert_close(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """|y - x weight^T| within what float32 sums and one rounding to y's dtype may lose.

    A sum of n products in one chain loses at most n units of 2^-24 of the sum of absolute products. The longest chain
    of any back end has n = in additions; 8 more for adding up lanes, panels and chains.
    """
    wide, dense = x.double(), weight.double()
    size = wide.abs() @ dense.abs().t()
    truth = wide @ dense.t()
    allowed = (x.shape[-1] + 8) * 2.0**-24 * size + torch.finfo(y.dtype).eps / 2 * truth.abs() * 1.001
    allowed += torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    worst = ((y.double() - truth).abs() / allowed).max().item() if y.numel() else 0.0
    assert worst <= 1.0, f"{worst:.2f} times the allowed error"


@contextmanager
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results begin as NaN, so an element that is not written is seen."""
    real = Tensor.new_empty

    def poisoned(self: Tensor, *size: object, **options: object) -> Tensor:
        tensor = real(self, *size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", poisoned)
        yield


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
