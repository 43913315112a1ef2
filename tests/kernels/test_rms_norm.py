"""The norm of a few rows against float64: awkward lengths, every dtype, special values, poisoned results, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from gossamer.errors import KernelError
from gossamer.kernels.rms_norm import reference
from gossamer.kernels.rms_norm.dispatch import rms_norm
from gossamer.kernels.tier import available, forced

DTYPES = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a step near 1
BACKENDS = [*available(), None]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    with forced(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 15), (2, 16), (1, 17), (5, 100), (1, 2048), (2, 4097)])
def test_against_float64(backend, dtype, rows, cols):
    generator = torch.Generator().manual_seed(cols)
    x = (torch.randn(rows, cols, generator=generator) * 3).to(dtype)
    weight = torch.randn(cols, generator=generator).to(dtype)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype is dtype
    wide = x.double()
    wanted = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    # Rounded twice to the dtype, and float32 sums of positive terms.
    allowed = wanted.abs() * (2 * DTYPES[dtype] + 2**-20) + torch.finfo(dtype).smallest_normal
    assert bool(((y.double() - wanted).abs() <= allowed).all())


def test_rows_do_not_know_each_other(backend):
    x = torch.randn(7, 333).bfloat16()
    weight = torch.randn(333).bfloat16()
    together = rms_norm(x[None], weight, 1e-6)[0]
    for row, one in zip(x, together, strict=True):
        assert torch.equal(rms_norm(row.clone(), weight, 1e-6), one)


def test_special_values(backend):
    weight = torch.tensor([1.0, -2.0, 0.5])
    x = torch.tensor([[0.0, -0.0, 0.0], [math.inf, 1.0, 2.0], [math.nan, 1.0, 2.0], [1e30, 1.0, 1.0]])
    y = rms_norm(x, weight, 1e-6)
    assert y[0].tolist() == [0.0, 0.0, 0.0]
    assert math.copysign(1, y[0, 1].item()) == 1.0  # -0 times -2
    assert torch.isnan(y[1, 0])
    assert y[1, 1:].tolist() == [0.0, 0.0]
    assert torch.isnan(y[2]).all()
    assert y[3].tolist() == [0.0, -0.0, 0.0]  # the sum of squares is infinite, as in torch
    assert torch.equal(torch.isnan(reference.rms_norm(x, weight, 1e-6)), torch.isnan(y))


def test_only_its_own_memory_is_written(backend):
    buffer = torch.full((3, 40), math.nan)
    x, weight = torch.randn(1, 40), torch.randn(40)
    buffer[1] = x
    y = rms_norm(buffer[1:2], weight, 1e-6)
    assert not torch.isnan(y).any()
    assert torch.isnan(buffer[0]).all()
    assert torch.isnan(buffer[2]).all()
    assert torch.equal(buffer[1:2], x)


def test_no_rows(backend):
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight", "said"),
    [
        (torch.ones(2, 4).double(), torch.ones(4).double(), "x is float64"),
        (torch.ones(2, 4), torch.ones(4).half(), "the weight float16"),
        (torch.ones(2, 4), torch.ones(5), "the last lengths must be equal"),
        (torch.ones(2, 0), torch.ones(0), "the last lengths must be equal"),
        (torch.ones(4, 2).t(), torch.ones(4), "both must be contiguous"),
        (torch.ones(2, 4, requires_grad=True), torch.ones(4), "a gradient is required"),
    ],
)
def test_what_is_refused(x, weight, said):
    with pytest.raises(KernelError, match=said):
        rms_norm(x, weight, 1e-6)


def test_compiled_models_can_hold_it():
    x, weight = torch.randn(2, 20), torch.randn(20)
    compiled = torch.compile(lambda a, b: rms_norm(a, b, 1e-6), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, weight), rms_norm(x, weight, 1e-6))
