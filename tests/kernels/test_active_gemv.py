"""Several matrices that skip the same inputs in one call: the bits of single calls, biases, centres, counts."""

from __future__ import annotations

import pytest
import torch
from gemv_cases import BACKENDS, FLOATS, assert_close, backend, bits_of, exact, integers, normal, threads
from gemv_cases import poisoned_results as poisoned

from gossamer.errors import KernelError
from gossamer.kernels.active.dispatch import active_gemv
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.channel_gemv.dispatch import channel_gemv
from gossamer.kernels.dual_gemv.dispatch import describe, dual_gemv, pack

IN, OUTS = 150, (1, 63, 64, 300, 4200)
MANY = 700  # inputs from which narrow matrices are cut into parts of them


def matrices(dtype, make, inputs=IN):
    """(weights for the call, dense [out, in]): every second one packed where the dtype allows it."""
    weights, dense = [], []
    for i, out in enumerate(OUTS):
        weight = make(out, inputs, dtype=dtype, seed=i)
        if i % 2 and dtype is not torch.float32:
            mask = torch.rand(out, inputs, generator=torch.Generator().manual_seed(i)) >= 0.5
            bits = bitmask.pack_bits(mask)
            weights.append(pack(bits, bitmask.compress(weight, bits), inputs))
            weight = weight * mask
        else:
            weights.append(weight.t().contiguous())
        dense.append(weight)
    return weights, dense


def one_by_one(x, weight, bias, limit):
    if weight.is_floating_point():
        return channel_gemv(x, weight, limit, bias)
    return dual_gemv(x, weight, limit, describe(weight).rows, bias)


def biases(dtype, make=integers):
    return [None if i == 2 else make(1, out, dtype=dtype, seed=20 + i)[0] for i, out in enumerate(OUTS)]


def limits(inputs=IN):
    return torch.rand(inputs, generator=torch.Generator().manual_seed(1)) * 8


@pytest.mark.parametrize("inputs", [IN, MANY])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_whole_numbers_are_exact_with_bias_and_center(name, dtype, inputs, monkeypatch):
    center, threshold = integers(1, inputs, dtype=torch.float32, seed=9)[0], limits(inputs)
    with backend(name), poisoned(monkeypatch):
        weights, dense = matrices(dtype, integers, inputs)
        for rows in (1, 2, 3, 5, 8):
            x = integers(rows, inputs, dtype=dtype, seed=rows, zeros=0.2)
            for middle in (None, center):
                moved = x if middle is None else (x.float() - middle).to(dtype)
                mask = moved.float().abs() > threshold
                results, read = active_gemv(x, threshold, weights, biases(dtype), middle)
                assert read == int(mask.any(0).sum())
                for y, weight, bias in zip(results, dense, biases(dtype), strict=True):
                    add = 0 if bias is None else bias.float()
                    wanted = ((moved * mask).float() @ weight.float().t() + add).to(dtype)
                    assert torch.equal(y, wanted), (rows, weight.shape)


@pytest.mark.parametrize("inputs", [IN, MANY])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_the_bits_of_single_calls_for_any_threads(name, dtype, inputs):
    weights, dense = matrices(dtype, normal, inputs)
    x, own, limit = normal(3, inputs, dtype=dtype, seed=4), biases(dtype, normal), limits(inputs) / 10
    with backend(name):
        single = [one_by_one(x, *pair, limit) for pair in zip(weights, own, strict=True)]
        assert_close(single[2], torch.where(x.float().abs() > limit, x, 0 * x), dense[2])
        for count in (1, 2, 3, 4):
            with threads(count):
                results, _ = active_gemv(x, limit, weights, own)
            assert all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(results, single, strict=True)), count
        alone = [active_gemv(row[None], limit, weights, own)[0] for row in x]
    for i in range(len(OUTS)):
        assert torch.equal(bits_of(torch.cat([one[i] for one in alone])), bits_of(results[i]))


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_active_leaves_the_bias(name, monkeypatch):
    dtype = torch.bfloat16
    with backend(name), poisoned(monkeypatch):
        weights, _ = matrices(dtype, integers)
        x = integers(2, IN, dtype=dtype, seed=1)
        results, read = active_gemv(x, torch.full((IN,), 1e9), weights, biases(dtype))
        assert read == 0
        for y, bias, out in zip(results, biases(dtype), OUTS, strict=True):
            assert torch.equal(y, (torch.zeros(out, dtype=dtype) if bias is None else bias).expand(2, out))
        results, read = active_gemv(x[:, :0], torch.zeros(0), [torch.zeros(0, 3, dtype=dtype)], [None])
        assert (results[0].tolist(), read) == ([[0.0] * 3] * 2, 0)


W, X, T = torch.ones(6, 4, dtype=torch.bfloat16), torch.ones(2, 6, dtype=torch.bfloat16), torch.zeros(6)
B = torch.zeros(4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, T, [], []), "at least one"),
        ((X, T, [W], []), "1 matrices with 0 biases"),
        ((X, T, [W], [B.float()]), "bias is float32 on cpu, it must be bfloat16"),
        ((X, T, [W], [B[:3]]), r"bias has shape \\[3\\], it must be contiguous \\[4\\]"),
        ((X, T, [W], [torch.zeros(8, dtype=torch.bfloat16)[::2]]), "contiguous"),
        ((X, T[:5], [W], [B]), "threshold has shape"),
        ((X, T, [W], [B], T.double()), "center is float64"),
        ((X, T, [W], [B], T[:5]), "center has shape"),
        ((X, T, [W, W[:5]], [B, B]), "last length must be 5"),
        ((X, T, [torch.zeros(80, dtype=torch.uint8)], [None]), "."),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(KernelError, match=message.replace("\\\\", "\\")):
        active_gemv(*arguments)


def test_single_calls_refuse_the_same():
    with pytest.raises(KernelError, match="bias is float32"):
        channel_gemv(X, W, T, B.float())
    assert torch.equal(channel_gemv(X, W, T, B + 2), exact(X, W.t()) + 2)
