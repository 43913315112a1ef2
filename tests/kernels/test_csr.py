"""Products with CSR matrices against float64: awkward shapes, densities, threads, poisoned memory, bad positions."""

from __future__ import annotations

import math

import pytest
import torch
from gemv_cases import threads
from torch import Tensor

from gossamer.errors import KernelError
from gossamer.kernels.csr.dispatch import csr_linear, csr_sampled

SHAPES = [(1, 1, 1), (2, 17, 15), (7, 63, 100), (8, 16, 32), (9, 100, 63), (32, 33, 48), (33, 5, 4097), (300, 64, 16)]
DENSITIES = [0.0, 0.01, 0.3, 1.0]


def sparse(rows: int, cols: int, density: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(dense matrix, mask, rowptr, columns, values); whole rows and columns without entries at low densities."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    mask = torch.rand(rows, cols, generator=generator) < density
    dense = torch.randn(rows, cols, generator=generator, dtype=dtype) * mask
    columns = mask.nonzero()[:, 1].to(torch.int32)
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).to(torch.int32)
    return dense, mask, rowptr, columns, dense[mask]


def operands(tokens: int, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    made = (torch.randn(tokens, size, generator=generator, dtype=dtype) for size in (rows, cols))
    return tuple(made)  # type: ignore[return-value]


def within(found: Tensor, left: Tensor, right: Tensor, terms: int) -> bool:
    """found = left @ right but for rounding: every sum of `terms` products in float32, in any order."""
    wanted = left.double() @ right.double()
    bound = left.double().abs() @ right.double().abs() * (terms + 2) * 2**-24
    return bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("tokens", "rows", "cols"), SHAPES)
def test_both_against_float64(on, tokens, rows, cols, density):
    dense, mask, rowptr, columns, values = sparse(rows, cols, density)
    gy, x = operands(tokens, rows, cols)
    y = csr_linear(x, rowptr, columns, values)
    assert y.shape == (tokens, rows)
    assert y.is_contiguous()
    assert within(y, x, dense.t(), cols)
    found = torch.zeros(rows, cols)
    found[mask] = csr_sampled(gy, x, rowptr, columns)
    whole = gy.double().t() @ x.double()
    bound = gy.double().abs().t() @ x.double().abs() * (tokens + 2) * 2**-24
    assert bool(((found.double() - whole).abs()[mask] <= bound[mask]).all())


def test_float64_is_exact_to_its_own_precision(on):
    dense, mask, rowptr, columns, values = sparse(20, 30, 0.3, torch.float64)
    gy, x = operands(11, 20, 30, torch.float64)
    assert torch.allclose(csr_linear(x, rowptr, columns, values), x @ dense.t(), rtol=1e-14, atol=1e-14)
    assert torch.allclose(csr_sampled(gy, x, rowptr, columns), (gy.t() @ x)[mask], rtol=1e-14, atol=1e-14)


def test_tokens_do_not_know_each_other(compiled):
    _, _, rowptr, columns, values = sparse(50, 70, 0.1)
    _, x = operands(77, 50, 70)
    together = csr_linear(x, rowptr, columns, values)
    for i in (0, 31, 32, 64, 76):
        assert torch.equal(csr_linear(x[i : i + 1], rowptr, columns, values)[0], together[i])
    x[40, 3], x[41, 5] = math.nan, math.inf
    spoiled = csr_linear(x, rowptr, columns, values)
    others = [i for i in range(77) if i not in (40, 41)]
    assert torch.equal(spoiled[others], together[others])
    assert bool(torch.isnan(spoiled[40]).any())


def test_threads_change_no_bit(compiled):
    _, _, rowptr, columns, values = sparse(300, 257, 0.05)
    gy, x = operands(700, 300, 257)
    first = csr_linear(x, rowptr, columns, values), csr_sampled(gy, x, rowptr, columns)
    for count in (2, 3, 7):
        with threads(count):
            again = csr_linear(x, rowptr, columns, values), csr_sampled(gy, x, rowptr, columns)
        assert all(map(torch.equal, first, again))


def test_memory_that_was_poisoned(compiled, monkeypatch):
    """Outputs and room of both are torch's new_empty: what lies there must not be seen."""
    dense, mask, rowptr, columns, values = sparse(37, 45, 0.2)
    gy, x = operands(41, 37, 45)
    plain = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: object) -> Tensor:
        return plain(self, *size, **options).fill_(math.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert not torch.isnan(csr_linear(x, rowptr, columns, values)).any()
    assert not torch.isnan(csr_sampled(gy, x, rowptr, columns)).any()


def test_neither_tokens_nor_entries(on):
    _, _, rowptr, columns, values = sparse(5, 6, 0.5)
    assert csr_linear(torch.empty(0, 6), rowptr, columns, values).shape == (0, 5)
    assert csr_sampled(torch.empty(0, 5), torch.empty(0, 6), rowptr, columns).tolist() == [0.0] * len(columns)
    empty = torch.empty(0, dtype=torch.int32)
    assert (
        csr_linear(torch.ones(3, 6), torch.zeros(6, dtype=torch.int32), empty, torch.empty(0)).tolist() == [[0] * 5] * 3
    )


def test_strided_operands(on):
    dense, mask, rowptr, columns, values = sparse(9, 20, 0.4)
    gy, x = operands(12, 18, 40)
    y = csr_linear(x[:, ::2], rowptr, columns, values)
    assert within(y, x[:, ::2], dense.t(), 20)
    assert torch.equal(
        csr_sampled(gy[:, ::2], x[:, ::2], rowptr, columns),
        csr_sampled(gy[:, ::2].contiguous(), x[:, ::2].contiguous(), rowptr, columns),
    )


@pytest.mark.parametrize(
    ("rowptr", "columns"),
    [
        ([0, 2, 1, 3], [0, 1, 2]),  # falls
        ([0, 1, 2, 4], [0, 1, 2]),  # an entry more than there are
        ([0, 1, 2, 2], [0, 1, 2]),  # one fewer
        ([1, 1, 2, 3], [0, 1, 2]),  # does not begin at 0
        ([0, 1, 2, 3], [0, 1, 4]),  # beyond the columns
        ([0, 1, 2, 3], [0, -1, 2]),
        ([0, 1 << 30, 1 << 30, 3], [0, 1, 2]),
    ],
)
def test_malformed_positions(compiled, rowptr, columns):
    rowptr, columns = (torch.tensor(index, dtype=torch.int32) for index in (rowptr, columns))
    with pytest.raises(KernelError, match=r"beyond a \[3, 4\] matrix"):
        csr_linear(torch.ones(2, 4), rowptr, columns, torch.ones(3))
    with pytest.raises(KernelError, match=r"beyond a \[3, 4\] matrix"):
        csr_sampled(torch.ones(2, 3), torch.ones(2, 4), rowptr, columns)


def test_refusals(on):
    _, _, rowptr, columns, values = sparse(5, 6, 0.5)
    x = torch.ones(2, 6)
    for spoiled, said in [
        ((x.double(), rowptr, columns, values), "one float dtype"),
        ((x, rowptr.long(), columns, values), "rowptr is int64"),
        ((x, rowptr, columns.long(), values), "columns is int64"),
        ((x[0], rowptr, columns, values), "x has shape"),
        ((x, rowptr, columns, values[:-1]), "values"),
        ((x, rowptr[:0], columns, values), "rowptr is empty"),
        ((x, rowptr, columns, values.clone().requires_grad_()), "gradient"),
    ]:
        with pytest.raises(KernelError, match=said):
            csr_linear(*spoiled)
    with pytest.raises(KernelError, match="gy has shape"):
        csr_sampled(torch.ones(3, 5), x, rowptr, columns)


def test_operators(on):
    _, _, rowptr, columns, values = sparse(9, 20, 0.4)
    gy, x = operands(12, 9, 20)
    torch.library.opcheck(torch.ops.gossamer.csr_linear.default, (x, rowptr, columns, values))
    torch.library.opcheck(torch.ops.gossamer.csr_sampled.default, (gy, x, rowptr, columns))

    def both(gy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return csr_linear(x * 2, rowptr, columns, values) + 1, csr_sampled(gy, x * 2, rowptr, columns) + 1

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(gy, x), both(gy, x)))
