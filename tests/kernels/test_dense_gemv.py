"""Dense products of a few rows: every tier against float64, exact on whole numbers."""

from __future__ import annotations

import pytest
import torch
from gemv_cases import BACKENDS, BATCHES, FLOATS, assert_close, backend, bits_of, exact, integers, normal, threads
from gemv_cases import poisoned_results as poisoned

from gossamer.errors import KernelError
from gossamer.kernels.dense_gemv.dispatch import dense_gemv

SHAPES = [(1, 1), (1, 63), (63, 1), (100, 63), (63, 100), (7, 4097), (130, 33), (0, 5), (5, 0), (2, 128)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_whole_numbers_are_exact(name, dtype, monkeypatch):
    with backend(name), poisoned(monkeypatch):
        for shape in SHAPES:
            weight = integers(*shape, dtype=dtype, seed=1, zeros=0.3)
            for batch in BATCHES:
                x = integers(batch, shape[1], dtype=dtype, seed=2)
                assert torch.equal(dense_gemv(x, weight), exact(x, weight)), (shape, batch)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_within_the_rounding_of_float32(name, dtype):
    with backend(name):
        for rows, cols in [(64, 100), (33, 4097)]:
            weight, x = normal(rows, cols, dtype=dtype, seed=3), normal(3, cols, dtype=dtype, seed=4)
            assert_close(dense_gemv(x, weight), x, weight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_same_bits_for_any_threads_and_any_company(name, dtype):
    weight, x = normal(515, 1031, dtype=dtype, seed=5), normal(8, 1031, dtype=dtype, seed=6)
    with backend(name), threads(1):
        alone = torch.cat([dense_gemv(row[None], weight) for row in x])
        together = dense_gemv(x, weight)
    if name != "torch":  # torch's own product may sum a single row in another order
        assert torch.equal(bits_of(alone), bits_of(together))
        for count in (2, 3, 4):
            with backend(name), threads(count):
                assert torch.equal(bits_of(dense_gemv(x, weight)), bits_of(together)), count


@pytest.mark.parametrize("name", BACKENDS)
def test_infinity_and_nan_as_in_linear(name):
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    x = torch.tensor([[1.0, 2.0, float("inf")], [float("nan"), 1.0, 1.0], [-float("inf"), 1.0, 0.0]]).bfloat16()
    with backend(name):
        y = dense_gemv(x, weight)
    wanted = x.double() @ weight.double().t()
    assert torch.equal(y.double().nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_leading_lengths_stay():
    weight = integers(5, 6, dtype=torch.float32, seed=1)
    x = integers(2, 3, 6, dtype=torch.float32, seed=2)
    y = dense_gemv(x, weight)
    assert y.shape == (2, 3, 5)
    assert torch.equal(y, x @ weight.t())
    assert dense_gemv(x[0, 0], weight).shape == (5,)


W = torch.ones(4, 6, dtype=torch.bfloat16)
X = torch.ones(2, 6, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (X.float(), W, "x is float32, the weight bfloat16"),
        (X, W.double(), "weight is float64, allowed: float32, bfloat16, float16"),
        (X[:, :5], W, r"shape \[2, 5\], its last length must be 6"),
        (torch.ones((), dtype=torch.bfloat16), W, r"shape \[\]"),
        (torch.ones(9, 6, dtype=torch.bfloat16), W, "9 rows, 1 to 8"),
        (torch.ones(0, 6, dtype=torch.bfloat16), W, "0 rows"),
        (torch.ones(6, 2, dtype=torch.bfloat16).t(), W, "strides"),
        (X, torch.ones(6, 4, dtype=torch.bfloat16).t(), "contiguous matrix"),
        (X, W[0], "contiguous matrix"),
        (X.to("meta"), W, "x is on meta, the weight on cpu"),
        (X.clone().requires_grad_(), W, "requires a gradient"),
        (X, W.clone().requires_grad_(), "weight requires a gradient"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, message):
    with pytest.raises(KernelError, match=message):
        torch.ops.gossamer.dense_gemv(x, weight) if not x.is_meta else dense_gemv_run(x, weight)


def dense_gemv_run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Meta tensors reach the fake implementation instead; this is what a call with them would be checked by."""
    from gossamer.kernels.dense_gemv import dispatch

    return dispatch._run(x, weight)
