"""The operators as torch sees them: schema, fake tensors, compilation, autograd."""

from __future__ import annotations

import pytest
import torch
from gemv_cases import integers

from gossamer.errors import KernelError
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv.dispatch import bitmask_dense, bitmask_gemv, pack
from gossamer.kernels.channel_gemv.dispatch import channel_gemv
from gossamer.kernels.dense_gemv.dispatch import dense_gemv
from gossamer.kernels.dual_gemv import dispatch as dual
from gossamer.kernels.int8_gemv import dispatch as int8
from gossamer.kernels.nm_gemv import dispatch as nm

WEIGHT = integers(20, 70, dtype=torch.bfloat16, seed=1, zeros=0.5)
BITS = bitmask.pack_bits(WEIGHT != 0)
PACKED = pack(BITS, bitmask.compress(WEIGHT, BITS), 70)
SCALES = torch.full((20, 1), 0.5).half()
INT8 = int8.pack(BITS, bitmask.compress(WEIGHT, BITS).char(), SCALES, 70)
DUAL = dual.pack(BITS, bitmask.compress(WEIGHT, BITS), 70)
WEIGHT_T = WEIGHT.t().contiguous()
THRESHOLD = torch.full((70,), 3.0)
PAIRS = WEIGHT * (torch.arange(70) % 4 < 2)
CODES = bitmask.pack_bits(PAIRS != 0)
SLOTS = nm.pack(CODES, bitmask.compress(PAIRS, CODES), 70, 2, 4)
CALLS = {
    "dense_gemv": (dense_gemv, (WEIGHT,)),
    "bitmask_gemv": (bitmask_gemv, (PACKED, 20)),
    "int8_gemv": (int8.int8_gemv, (INT8, 20)),
    "channel_gemv": (channel_gemv, (WEIGHT_T, THRESHOLD)),
    "nm_gemv": (nm.nm_gemv, (CODES, SLOTS, 2, 4)),
    "dual_gemv": (dual.dual_gemv, (DUAL, THRESHOLD, 20)),
}


def x_of(*shape: int) -> torch.Tensor:
    return integers(*shape, dtype=torch.bfloat16, seed=2)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    for shape in ((1, 70), (2, 3, 70), (70,)):
        torch.library.opcheck(getattr(torch.ops.gossamer, name).default, (x_of(*shape), *CALLS[name][1]))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_whole_and_equal(name, compiler):
    call, rest = CALLS[name]

    def layer(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return call(x * 2, *rest) + 1

    torch._dynamo.reset()  # the same code object for every operation: they would add up to the limit
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for shape in ((1, 70), (3, 70)):
            assert torch.equal(compiled(x_of(*shape), *rest), layer(x_of(*shape), *rest))


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_give_the_shape(name):
    call, rest = CALLS[name]
    with torch._subclasses.FakeTensorMode() as mode:
        arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in rest]
        y = call(torch.empty(2, 1, 70, dtype=torch.bfloat16), *arguments)
    assert (y.shape, y.dtype) == ((2, 1, 20), torch.bfloat16)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_refused_and_no_grad_is_fine(name):
    call, rest = CALLS[name]
    x = x_of(1, 70).requires_grad_()
    with pytest.raises(KernelError, match="requires a gradient.*torch.no_grad"):
        call(x, *rest)
    with torch.no_grad():
        assert call(x, *rest).shape == (1, 20)
    with torch.inference_mode():
        assert call(x_of(1, 70), *rest).shape == (1, 20)


@pytest.mark.parametrize(
    ("name", "call", "packed"), [("bitmask_dense", bitmask_dense, PACKED), ("dual_dense", dual.dual_dense, DUAL)]
)
def test_dense_matrix_of_a_packed_one(name, call, packed):
    arguments = (packed, 20, 70, torch.bfloat16)
    torch.library.opcheck(getattr(torch.ops.gossamer, name).default, arguments)
    assert torch.equal(call(*arguments), WEIGHT)
    for wrong in ((21, 70, torch.bfloat16), (20, 71, torch.bfloat16), (20, 70, torch.float16)):
        with pytest.raises(KernelError, match=r"is bfloat16 \[20, 70\], the call says"):
            call(packed, *wrong)


def test_dense_matrix_of_an_int8_one():
    arguments = (INT8, 20, 70, torch.float16)
    torch.library.opcheck(torch.ops.gossamer.int8_dense.default, arguments)
    assert torch.equal(int8.int8_dense(*arguments), WEIGHT.half() / 2)
