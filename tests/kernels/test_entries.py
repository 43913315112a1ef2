"""Large entries and channel norms of a matrix, one by one and in float64: shapes, floors, threads, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from gemv_cases import threads
from torch import Tensor

from gossamer.errors import KernelError
from gossamer.kernels.entries import reference
from gossamer.kernels.entries.dispatch import channel_squares, entries_beyond

NAN, INF = float("nan"), float("inf")
SHAPES = [(1, 1), (1, 4097), (7, 63), (64, 100), (65, 33), (129, 16), (300, 257)]


def matrix(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 1000 + cols))


def weights(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + cols)
    return torch.rand(rows, generator=generator) + 0.1, torch.rand(cols, generator=generator) + 0.1


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_squares_against_float64(on, rows, cols):
    given = matrix(rows, cols)
    found = channel_squares(given)
    for one, axis, terms in zip(found, (1, 0), (cols, rows), strict=True):
        wanted = given.double().square().sum(axis)
        assert one.dtype is torch.float32
        assert one.shape == wanted.shape
        assert bool(((one.double() - wanted).abs() <= wanted * (terms + 1) * 2**-24).all())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.5, 2.0, 100.0])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_entries_one_by_one(on, rows, cols, floor, weighted):
    given, by = matrix(rows, cols), weights(rows, cols) if weighted else None
    given[given.abs() < 0.1] = 0.0
    position, value = entries_beyond(given, floor, by)
    product = given if by is None else given * by[1] * by[0].unsqueeze(1)
    wanted = {i: one for i, one in enumerate(product.flatten().tolist()) if abs(one) > floor}
    assert position.tolist() == list(wanted)
    assert value.tolist() == list(wanted.values())
    assert position.dtype is torch.int64


def test_a_floor_is_not_beyond_itself_and_what_is_not_a_number_is_nowhere(on):
    given = torch.tensor([[1.0, -1.0, NAN, INF, -INF, 0.0, -0.0, 1.0000001, 1.0, -2.0]] * 3)
    assert entries_beyond(given, 1.0)[0].tolist() == [r * 10 + c for r in range(3) for c in (3, 4, 7, 9)]
    by = torch.ones(3), torch.zeros(10)
    assert entries_beyond(given, 0.0, by)[0].tolist() == []  # infinity times zero is no number


@pytest.mark.parametrize("rows", [1000, 63])
def test_the_same_bits_for_any_number_of_threads(compiled, rows):
    given, by = matrix(rows, 700), weights(rows, 700)
    first = *channel_squares(given), *entries_beyond(given, 0.7, by)
    for count in (1, 2, 3):
        with threads(count):
            again = *channel_squares(given), *entries_beyond(given, 0.7, by)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_torch_finds_the_same_bits(compiled):
    given, by = matrix(130, 77), weights(130, 77)
    for one, other in zip(entries_beyond(given, 0.3, by), reference.entries_beyond(given, 0.3, by), strict=True):
        assert torch.equal(one, other)


def test_nothing_of_memory_that_was_not_written(on, monkeypatch):
    make = Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: object) -> Tensor:
        return make(self, *size, **options).fill_(NAN)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    given = matrix(130, 77)
    rows, cols = channel_squares(given)
    assert not rows.isnan().any()
    assert not cols.isnan().any()
    assert not entries_beyond(given, 0.3)[1].isnan().any()


def test_strides_and_other_dtypes(on):
    given, by = matrix(40, 66), weights(20, 33)
    part = given[::2, ::2]
    assert all(map(torch.equal, channel_squares(part), channel_squares(part.contiguous())))
    assert all(map(torch.equal, entries_beyond(part, 0.5, by), entries_beyond(part.contiguous(), 0.5, by)))
    position, value = entries_beyond(part.double(), 0.5, by)
    assert value.dtype is torch.float64
    assert torch.allclose(value, (part.double() * by[1] * by[0].unsqueeze(1)).flatten()[position])
    assert channel_squares(part.to(torch.bfloat16))[0].dtype is torch.float32


def test_empty_ones(on):
    for shape in ((0, 5), (5, 0), (0, 0)):
        rows, cols = channel_squares(torch.empty(shape))
        assert rows.tolist() == [0.0] * shape[0]
        assert cols.tolist() == [0.0] * shape[1]
        assert len(entries_beyond(torch.empty(shape), 0.0)[0]) == 0


def test_what_is_refused(on):
    given = torch.ones(3, 4)
    for spoiled, message in (
        ((given.int(), 0.0), "int32"),
        ((given[0], 0.0), "allowed: \\[rows, cols\\]"),
        ((given, 0.0, (torch.ones(4), torch.ones(4))), "weights have shapes"),
        ((given, 0.0, (torch.ones(3), torch.ones(4, 1))), "weights have shapes"),
        ((given, 0.0, (torch.ones(3), torch.ones(4, device="meta"))), "meta"),
        ((given.clone().requires_grad_(), 0.0), "gradient"),
    ):
        with pytest.raises(KernelError, match=message):
            entries_beyond(*spoiled)
    with pytest.raises(KernelError, match="int32"):
        channel_squares(given.int())
