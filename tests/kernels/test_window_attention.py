"""Attention over ranges of a ragged cache: every tier against float64; rows outside of the ranges are not read."""

from __future__ import annotations

import pytest
import torch
from gemv_cases import BACKENDS, FLOATS, backend, bits_of, normal, threads
from gemv_cases import poisoned_results as poisoned
from torch import Tensor

from gossamer.errors import KernelError
from gossamer.kernels.window_attention.dispatch import window_attention, window_step

NAN = float("nan")
# batch, KV heads, query heads per KV head, width
SHAPES = [
    (1, 1, 1, 8),
    (2, 3, 2, 5),
    (1, 2, 8, 64),
    (3, 1, 7, 33),
    (1, 2, 3, 80),
    (2, 1, 13, 16),
    (1, 1, 4, 128),
    (1, 1, 1, 1),
]
LENGTHS = [(1, 0), (0, 1), (17, 30), (512, 0), (500, 13), (700, 1100), (3, 0), (0, 0)]


def ranges_of(batch: int, kv_heads: int, seed: int) -> tuple[Tensor, int]:
    """Ranges of the lengths in LENGTHS, each behind a gap, and the number of rows."""
    found, row = [], 1
    for i in range(batch * kv_heads):
        for count in LENGTHS[(seed + i) % len(LENGTHS)]:
            found += [row, count]
            row += count + 3
    return torch.tensor(found).view(batch, kv_heads, 4), row


def case(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int):
    batch, kv_heads, group, width = shape
    ranges, rows = ranges_of(batch, kv_heads, seed)
    query = normal(batch, kv_heads * group, width, dtype=dtype, seed=seed)
    keys, values = (normal(rows, width, dtype=dtype, seed=seed + more) for more in (1, 2))
    inside = torch.zeros(rows, dtype=torch.bool)
    for begin, count in ranges.view(-1, 2).tolist():
        inside[begin : begin + count] = True
    keys[~inside], values[~inside] = NAN, NAN
    return query, keys, values, ranges


def exact(query: Tensor, keys: Tensor, values: Tensor, ranges: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """In float64, and how far sums in float32 may be off."""
    batch, heads, width = query.shape
    group = heads // ranges.shape[1]
    out, off = torch.zeros(2, batch, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            rows = torch.cat([torch.arange(a, a + n) for a, n in ranges[b, h // group].view(2, 2).tolist()])
            if not len(rows):
                continue
            q, k, v = query[b, h].double(), keys[rows].double(), values[rows].double()
            weights = torch.softmax(scale * (k @ q), 0)
            slack = (width + 8) * 2.0**-24 * scale * (k.abs() @ q.abs()).max() + 4 * 2.0**-24  # of a score
            out[b, h] = weights @ v
            off[b, h] = (2 * slack + (len(rows) + 32) * 2.0**-24) * (weights @ v.abs())
    return out, off + torch.finfo(query.dtype).eps / 2 * out.abs() * 1.001


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_within_the_rounding_of_float32(name, dtype, monkeypatch):
    with backend(name), poisoned(monkeypatch):
        for seed, shape in enumerate(SHAPES):
            query, keys, values, ranges = case(shape, dtype, seed)
            scale = 0.7 * shape[3] ** -0.5 * (5 if seed % 2 else 1)
            y = window_attention(query, keys, values, ranges, scale).double()
            wanted, off = exact(query, keys, values, ranges, scale)
            assert ((y - wanted).abs() <= off).all(), (shape, ((y - wanted).abs() / off).max())
            assert y.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_far_apart_scores(name, dtype):
    """The greatest score takes all, wherever it lies; none overflows."""
    query = torch.full((1, 2, 16), 30.0, dtype=dtype)
    keys, values = -torch.ones(1300, 16, dtype=dtype), normal(1300, 16, dtype=dtype, seed=1)
    with backend(name):
        for place in (0, 511, 512, 1299):
            keys.fill_(-1)[place] = 1
            y = window_attention(query, keys, values, torch.tensor([[[0, 1300, 0, 0]]]), 1.0)
            assert torch.equal(y, values[place].expand(1, 2, 16))


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_and_infinity(name):
    keys, values, query = torch.ones(40, 4), torch.ones(40, 4), torch.ones(1, 1, 4)
    ranges = torch.tensor([[[3, 30, 0, 0]]])
    with backend(name):
        for tensor in (keys, values):
            for bad in (NAN, float("inf")):
                tensor[5, 1] = bad
                y = window_attention(query, keys, values, ranges, 0.5)
                wanted = torch.softmax(query[0] @ keys[3:33].t() * 0.5, -1) @ values[3:33]
                assert torch.equal(y[0].isnan(), wanted.isnan())
                assert torch.equal(y[0].isinf(), wanted.isinf())
                tensor[5, 1] = 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_same_bits_for_any_threads_and_any_company(name, dtype):
    query = normal(3, 8, 64, dtype=dtype, seed=3)
    keys, values = (normal(20000, 64, dtype=dtype, seed=seed) for seed in (4, 5))
    first, second = [[0, 5000, 5000, 3], [6000, 10, 7000, 600]], [[9000, 513, 0, 0], [1, 2, 9, 4]]
    ranges = torch.tensor([first, second, [[1, 9999, 10003, 999], [5, 0, 7, 0]]])
    with backend(name), threads(1):
        together = window_attention(query, keys, values, ranges, 0.125)
        for row in range(3):
            for head in range(2):
                mine = query[row : row + 1, 4 * head : 4 * head + 4].contiguous()
                alone = window_attention(mine, keys, values, ranges[row : row + 1, head : head + 1].contiguous(), 0.125)
                assert torch.equal(bits_of(alone[0]), bits_of(together[row, 4 * head : 4 * head + 4]))
    for count in (2, 3, 4):
        with backend(name), threads(count):
            assert torch.equal(bits_of(window_attention(query, keys, values, ranges, 0.125)), bits_of(together)), count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_stores_and_attends(name, dtype):
    query, keys, values, ranges = case((2, 2, 3, 24), dtype, 2)
    slots = ranges[..., 0].contiguous() + 1
    key, value = (normal(2, 2, 24, dtype=dtype, seed=seed) for seed in (7, 8))
    wanted_keys, wanted_values = keys.clone(), values.clone()
    wanted_keys[slots], wanted_values[slots] = key, value
    with backend(name):
        wanted = window_attention(query, wanted_keys, wanted_values, ranges, 0.3)
        y = window_step(query, key, value, keys, values, slots, ranges, 0.3)
    assert torch.equal(bits_of(y), bits_of(wanted))
    assert torch.equal(bits_of(keys), bits_of(wanted_keys))
    assert torch.equal(bits_of(values), bits_of(wanted_values))


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_are_checked(name):
    query, cache, new = torch.ones(1, 2, 4), torch.ones(10, 4), torch.zeros(1, 1, 4)
    with backend(name):
        for wrong in (
            [-1, 2, 0, 0], [0, 11, 0, 0], [0, 0, 10, 1], [0, 1, 11, 0], [5, -1, 0, 0], [2**62, 2**62, 0, 0],
            [0, 1, 1, 2**63 - 1], [0, -(2**63), 0, 0],
        ):  # fmt: skip
            ranges = torch.tensor([[wrong]])
            with pytest.raises(KernelError, match="beyond the 10 rows"):
                window_attention(query, cache, cache, ranges, 1.0)
        for slot in (-1, 10, 2**62):
            ranges = torch.tensor([[[0, 10, 10, 0]]])
            with pytest.raises(KernelError, match="beyond the 10 rows"):
                window_step(query, new, new, cache, cache.clone(), torch.tensor([[slot]]), ranges, 1.0)
        assert (cache == 1).all()


Q, C, N = torch.ones(2, 4, 8), torch.ones(10, 8), torch.ones(2, 2, 8)
R, S = torch.zeros(2, 2, 4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q.double(), C, C, R), "query is float64"),
        ((Q[0], C, C, R), r"query has shape \[4, 8\]"),
        ((Q.transpose(0, 1), C, C, R), "contiguous"),
        ((Q, C.half(), C, R), "keys are float16 on cpu, the query float32"),
        ((Q, C, C[:, :7], R), "values have shape"),
        ((Q, C, C[:9], R), "values have shape"),
        ((Q, C, C, R.int()), "ranges are int32"),
        ((Q, C, C, R[:1]), r"ranges have shape \[1, 2, 4\]"),
        ((Q, C, C, R[..., :2].contiguous()), "ranges have shape"),
        ((Q, C, C, torch.zeros(2, 3, 4).long()), "4 query heads on 3 KV heads"),
        ((Q.clone().requires_grad_(), C, C, R), "a gradient is required"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(KernelError, match=message):
        window_attention(*arguments, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": N[:1]}, "key is float32"),
        ({"value": N.half()}, "value is float16"),
        ({"slots": S.int()}, "slots are int32"),
        ({"slots": S[:1]}, "slots are int64"),
    ],
)
def test_what_does_not_fit_a_step_is_refused(changes, message):
    values = {"query": Q, "key": N, "value": N, "keys": C.clone(), "values": C.clone(), "slots": S, "ranges": R}
    with pytest.raises(KernelError, match=message):
        window_step(**(values | changes), scale=1.0)


def test_as_torch_sees_it():
    """Schema, fake tensors, what is changed in place."""
    query, keys, values, ranges = case((2, 2, 3, 24), torch.bfloat16, 2)
    keys, values = keys.nan_to_num(0.0), values.nan_to_num(0.0)
    new, slots = normal(2, 2, 24, dtype=torch.bfloat16, seed=7), ranges[..., 0].contiguous()
    torch.library.opcheck(torch.ops.gossamer.window_attention.default, (query, keys, values, ranges, 0.5))
    step = torch.ops.gossamer.window_step.default
    torch.library.opcheck(step, (query, new, new, keys, values, slots, ranges, 0.5))
