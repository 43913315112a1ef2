"""Activation-sparse products: every tier against float64, exact on whole numbers; what is skipped is not read."""

from __future__ import annotations

import pytest
import torch
from gemv_cases import BACKENDS, BATCHES, FLOATS, assert_close, backend, bits_of, exact, integers, normal, threads
from gemv_cases import poisoned_results as poisoned

from gossamer.errors import KernelError
from gossamer.kernels.channel_gemv.dispatch import channel_gemv, transpose

SHAPES = [(1, 1), (63, 1), (1, 63), (63, 100), (100, 63), (4, 4097), (4097, 5), (40, 1100), (0, 5), (5, 0), (16, 64)]
INF, NAN = float("inf"), float("nan")


def kept(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(x.float().abs() > threshold, x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_whole_numbers_are_exact(name, dtype, monkeypatch):
    """Thresholds from "nothing is skipped" to "everything", one per channel."""
    with backend(name), poisoned(monkeypatch):
        for channels, outputs in SHAPES:
            weight_t = integers(channels, outputs, dtype=dtype, seed=1)
            for batch, share in zip(BATCHES, (0.0, 0.3, 0.5, 0.9, 1.0), strict=True):
                x = integers(batch, channels, dtype=dtype, seed=batch, zeros=0.2)
                threshold = torch.rand(channels, generator=torch.Generator().manual_seed(3)) * 16 * share - float(
                    share == 0
                )
                y = channel_gemv(x, weight_t, threshold)
                wanted = exact(kept(x, threshold), weight_t.t())
                assert torch.equal(y, wanted), (channels, outputs, batch)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_within_the_rounding_of_float32(name, dtype):
    with backend(name):
        weight_t, x = normal(1000, 97, dtype=dtype, seed=3), normal(3, 1000, dtype=dtype, seed=4)
        threshold = torch.full((1000,), 0.7)
        assert_close(channel_gemv(x, weight_t, threshold), kept(x, threshold), weight_t.t())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_same_bits_for_any_threads_and_any_company(name, dtype):
    weight_t, x = normal(515, 4331, dtype=dtype, seed=5), normal(8, 515, dtype=dtype, seed=6)
    threshold = torch.rand(515, generator=torch.Generator().manual_seed(7))
    with backend(name), threads(1):
        together = channel_gemv(x, weight_t, threshold)
        alone = torch.cat([channel_gemv(row[None], weight_t, threshold) for row in x])
    assert torch.equal(bits_of(alone), bits_of(together))
    for count in (2, 3, 4):
        with backend(name), threads(count):
            assert torch.equal(bits_of(channel_gemv(x, weight_t, threshold)), bits_of(together)), count


@pytest.mark.parametrize("name", BACKENDS)
def test_the_threshold_itself_is_skipped_and_nan_never_is(name):
    weight_t = torch.eye(4, dtype=torch.float32)
    with backend(name):
        y = channel_gemv(torch.tensor([0.5, -0.5, 0.75, -0.75]), weight_t, torch.full((4,), 0.5))
        assert y.tolist() == [0.0, 0.0, 0.75, -0.75]
        assert channel_gemv(torch.tensor([0.0, -0.0, 1.0, -1.0]), weight_t, torch.zeros(4)).tolist() == [0, 0, 1, -1]
        y = channel_gemv(torch.tensor([NAN, 1.0, 1.0, 1.0]), weight_t, torch.full((4,), INF))
        assert y.isnan().tolist() == [True] * 4  # NaN times 0
        y = channel_gemv(torch.tensor([INF, 0.0, 0.0, 0.0]), torch.ones(4, 4), torch.full((4,), 2.0))
        assert y.tolist() == [INF] * 4
        assert channel_gemv(torch.ones(4), weight_t, torch.full((4,), NAN)).tolist() == [1.0] * 4


@pytest.mark.parametrize("name", BACKENDS)
def test_skipped_channels_are_not_read(name):
    """Channels that no row needs may hold anything."""
    weight_t = integers(50, 33, dtype=torch.bfloat16, seed=1)
    x = integers(3, 50, dtype=torch.bfloat16, seed=2, zeros=0.6)
    unused = (x == 0).all(0)
    assert 0 < int(unused.sum()) < 50
    wanted = exact(x, weight_t.t())
    weight_t[unused] = NAN
    with backend(name):
        assert torch.equal(channel_gemv(x, weight_t, torch.zeros(50)), wanted)


def test_transpose_is_the_weight_in_memory_of_its_own():
    weight = normal(2051, 1030, dtype=torch.bfloat16, seed=1)
    weight_t = transpose(weight)
    assert weight_t.is_contiguous()
    assert torch.equal(weight_t, weight.t())
    assert weight_t.data_ptr() != weight.data_ptr()
    assert transpose(torch.nn.Parameter(weight[:3])).requires_grad is False
    with pytest.raises(KernelError, match="must be a matrix on the CPU"):
        transpose(weight[0])


W = torch.ones(6, 4, dtype=torch.bfloat16)
X = torch.ones(2, 6, dtype=torch.bfloat16)
T = torch.zeros(6)


@pytest.mark.parametrize(
    ("x", "weight_t", "threshold", "message"),
    [
        (X.half(), W, T, "x is float16, the weight bfloat16"),
        (X, W.int(), T, "weight_t is int32, allowed"),
        (X[:, :4], W, T, "last length must be 6"),
        (torch.ones(9, 6, dtype=torch.bfloat16), W, T, "9 rows"),
        (torch.ones(6, 2, dtype=torch.bfloat16).t(), W, T, "strides"),
        (X, torch.ones(4, 6, dtype=torch.bfloat16).t(), T, "weight_t has shape"),
        (X, W, T.double(), "threshold is float64 on cpu, it must be float32"),
        (X, W, T[:5], r"threshold has shape \[5\], it must be contiguous \[6\]"),
        (X, W, torch.zeros(12)[::2], "contiguous"),
        (X, W, torch.zeros(6, 1), "contiguous"),
        (X.clone().requires_grad_(), W, T, "requires a gradient"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight_t, threshold, message):
    with pytest.raises(KernelError, match=message):
        channel_gemv(x, weight_t, threshold)
