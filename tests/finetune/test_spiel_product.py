"""The products of a layer with a sparse delta, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from gossamer.finetune.spiel import product
from gossamer.finetune.spiel.positions import ByColumn, check, draw, generator, is_kept, to_csr, to_flat
from gossamer.finetune.spiel.product import BACKENDS, choose, delta_product
from gossamer.kernels.tier import available, current, forced
from gossamer.pruning.mask import Mask


def delta(rows, cols, count, dtype=torch.float64):
    flat = draw(count, rows, cols, generator(3, "layer"))
    values = torch.randn(count, dtype=dtype, requires_grad=True)
    return flat, values, *to_csr(flat, rows, cols)


def call(backend, x, values, rowptr, columns, rows, weight, bias):
    """x (W + S)^T + b whatever the back end."""
    if backend == "weight":
        return delta_product(x, values, rowptr, columns, rows, backend, weight=weight, bias=bias)
    return torch.nn.functional.linear(x, weight, bias) + delta_product(x, values, rowptr, columns, rows, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "count"), [(7, 5, 9), (3, 8, 24), (1, 6, 2), (6, 1, 3)])
def test_gradcheck(backend, rows, cols, count, monkeypatch):
    monkeypatch.setattr(product, "BLOCK", 2 * cols)  # several blocks of dW
    _, values, rowptr, columns = delta(rows, cols, count)
    weight, bias = torch.randn(rows, cols, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    x = torch.randn(2, 4, cols, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, values: call(backend, x, values, rowptr, columns, rows, weight, bias), (x, values)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_dense_matrix(backend):
    rows, cols = 33, 47
    flat, values, rowptr, columns = delta(rows, cols, 60, torch.float32)
    weight, bias = torch.randn(rows, cols), torch.randn(rows)
    x = torch.randn(5, cols, requires_grad=True)
    dense = torch.zeros(rows, cols)
    dense.view(-1)[flat] = values.detach()
    whole = (weight + dense).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    want = torch.nn.functional.linear(x2, whole, bias)
    got = call(backend, x, values, rowptr, columns, rows, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    gy = torch.randn_like(got)
    got.backward(gy)
    want.backward(gy)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.grad, whole.grad.view(-1)[flat], rtol=1e-5, atol=1e-5)


def test_the_order_by_columns_follows_positions_that_move():
    """In place, as an optimizer moves them, and to a layer of other entries."""
    rows, cols, kept = 9, 7, ByColumn()
    _, values, rowptr, columns = delta(rows, cols, 20, torch.float32)
    for seed in range(4):
        flat = draw(20 if seed < 3 else 5, rows, cols, generator(seed, "moved"))
        if seed < 3:
            for held, new in zip((rowptr, columns), to_csr(flat, rows, cols), strict=True):
                held.copy_(new)
        else:
            values, (rowptr, columns) = torch.randn(5, requires_grad=True), to_csr(flat, rows, cols)
        x = torch.randn(3, cols, requires_grad=True)
        gy = torch.randn(3, rows)
        delta_product(x, values, rowptr, columns, rows, "csr", by_column=kept).backward(gy)
        dense = torch.zeros(rows * cols)
        dense[flat] = values.detach()
        torch.testing.assert_close(x.grad, gy @ dense.view(rows, cols))


@pytest.mark.parametrize("backend", ["csr", "dense"])
def test_small_deltas_on_a_bfloat16_layer_are_not_rounded_away(backend):
    flat, values, rowptr, columns = delta(8, 16, 20, torch.float32)
    values = (values.detach() * 1e-6).requires_grad_()
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    y = delta_product(x, values, rowptr, columns, 8, backend)
    dense = torch.zeros(8, 16)
    dense.view(-1)[flat] = values.detach()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x.float() @ dense.t(), rtol=2e-2, atol=1e-8)
    y.float().sum().backward()
    assert values.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, x.float().sum(0)[columns.long()], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("matrix", ["needed", "welcome", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_watches_gets_the_whole_gradient_or_its_factors(backend, matrix, monkeypatch):
    rows, cols, asked = 9, 6, matrix
    monkeypatch.setattr(product, "BLOCK", 4 * cols)
    _, values, rowptr, columns = delta(rows, cols, 8, torch.float32)
    weight = torch.randn(rows, cols)
    x, gy = torch.randn(4, cols), torch.randn(4, rows)
    seen = torch.full((rows, cols), float("nan"))
    by_factors = matrix == "none" or (matrix == "welcome" and backend == "csr")

    class Watch:
        matrix = asked

        def begin(self, first):
            pass

        def outer(self, gy, x):
            assert by_factors
            seen.copy_(gy.t() @ x)

        def see(self, first, block):
            assert not by_factors
            seen[first : first + len(block)] = block
            block.fill_(float("nan"))  # a block may be overwritten

        def end(self, gradient):
            self.gradient = gradient.clone()

    watch = Watch()
    extra = {"weight": weight} if backend == "weight" else {}
    delta_product(x, values, rowptr, columns, rows, backend, watch=watch, **extra).backward(gy)
    whole = gy.t() @ x
    torch.testing.assert_close(seen, whole)
    torch.testing.assert_close(values.grad, whole.view(-1)[to_flat(rowptr, columns, cols)])
    assert torch.equal(watch.gradient, values.grad)


def test_nothing_of_the_size_of_the_weight_is_saved():
    rows, cols = 64, 64
    _, values, rowptr, columns = delta(rows, cols, 40, torch.float32)
    x, held = torch.randn(2, cols, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.nbytes) or t, lambda t: t):
        delta_product(x, values, rowptr, columns, rows, "csr")
        delta_product(x, values, rowptr, columns, rows, "dense")
    assert sum(held) == 2 * (x.nbytes + values.nbytes + rowptr.nbytes + columns.nbytes)


def test_the_choice_of_the_back_end():
    assert choose("cpu", torch.float32, 0.01) == "csr"
    vectors = current() is not None and current().name != "scalar"
    assert choose("cpu", torch.float32, 0.09) == ("csr" if vectors else "weight")
    for slow in ("scalar", None) if available() else (None,):
        with forced(slow):
            assert choose("cpu", torch.float32, 0.09) == "weight"
            assert choose("cpu", torch.float32, 0.02) == "csr"
    assert choose("cpu", torch.float32, 0.2) == "weight"
    assert choose("cpu", torch.bfloat16, 0.2) == "dense"
    assert choose("cuda", torch.bfloat16, 0.01) == "dense"
    assert choose("cuda", torch.float32, 0.01) == "weight"
    with pytest.raises(ValueError, match="known: csr"):
        delta_product(torch.ones(1, 2), torch.ones(0), *to_csr(torch.ones(0).long(), 3, 2), 3, "other")


@pytest.mark.parametrize("kept", [None, 0.5])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_draw(count, kept):
    mask = None if kept is None else Mask.from_bool(torch.rand(9, 11) < kept, "0.5")
    flat = draw(count, 9, 11, generator(1, "a"), mask)
    assert len(flat) == count
    assert torch.equal(flat, flat.unique())
    assert mask is None or bool(is_kept(mask, flat).all())
    assert torch.equal(flat, draw(count, 9, 11, generator(1, "a"), mask))
    assert torch.equal(to_flat(*to_csr(flat, 9, 11), 11), flat)
    check(*to_csr(flat, 9, 11), 9, 11, "layer")
    if count == 7:
        assert not torch.equal(flat, draw(count, 9, 11, generator(1, "b"), mask))


def test_draw_takes_every_position_equally_often():
    hits = torch.zeros(12)
    for seed in range(3000):
        hits[draw(2, 3, 4, generator(seed, "x"))] += 1
    assert hits.min() > 400
    assert hits.max() < 600
