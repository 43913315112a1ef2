"""Packed masks: plain torch and C++ against numpy, on awkward shapes, with bits that arithmetic would lose."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from gossamer.errors import KernelError
from gossamer.kernels import extension
from gossamer.kernels.bitmask import dispatch, reference

SHAPES = [(0, 5), (3, 0), (0, 0), (1, 1), (1, 8), (2, 7), (3, 63), (5, 64), (4, 65), (100, 257), (7, 1024)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@pytest.fixture(params=["compiled", "torch"])
def backend(request, monkeypatch) -> str:
    """Both implementations behind the same public names."""
    if request.param == "torch":
        monkeypatch.setattr(dispatch, "compiled", lambda: None)
    elif extension.compiled() is None:
        assert os.environ.get(extension.VARIABLE, "0") not in ("", "0"), "every test installation has the module"
        pytest.skip(f"{extension.VARIABLE} is set")
    return request.param


def random_mask(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > 0.4


def any_bits(rows: int, cols: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Every bit pattern: NaNs with payloads, infinities, subnormals, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * cols * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(rows, cols)


def integers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().view(INTEGERS[tensor.element_size()])


def numpy_bits(mask: torch.Tensor) -> np.ndarray:
    return np.packbits(mask.numpy(), axis=1, bitorder="little")


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_numpys_little_order(backend, shape):
    mask = random_mask(*shape)
    bits = dispatch.pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert tuple(bits.shape) == (shape[0], -(-shape[1] // 8))
    assert np.array_equal(bits.numpy(), numpy_bits(mask))
    assert torch.equal(dispatch.unpack_bits(bits, shape[1]), mask)
    counts = dispatch.row_counts(bits)
    assert counts.dtype == torch.int64
    assert counts.tolist() == mask.numpy().sum(1).tolist()


def test_bits_written_by_hand(backend):
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[0, 9] = mask[1, 7] = mask[1, 8] = True
    assert dispatch.pack_bits(mask).tolist() == [[0b00001001, 0b10], [0b10000000, 0b01]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_pattern_survives(backend, shape, dtype):
    weight, mask = any_bits(*shape, dtype), random_mask(*shape)
    bits = torch.from_numpy(numpy_bits(mask))
    values = dispatch.compress(weight, bits)
    expected = integers(weight).reshape(shape)[mask.numpy()]
    assert values.dtype == dtype
    assert values.dim() == 1
    assert np.array_equal(integers(values), expected)
    again = dispatch.expand(values, bits, shape[1])
    assert (again.dtype, tuple(again.shape)) == (dtype, shape)
    dense = np.zeros(shape, INTEGERS[dtype.itemsize])
    dense[mask.numpy()] = expected
    assert np.array_equal(integers(again).reshape(shape), dense)


def test_kept_negative_zero_and_pruned_garbage(backend):
    weight = torch.tensor([[-0.0, float("nan"), 0.0, -0.0]], dtype=torch.bfloat16)
    bits = dispatch.pack_bits(torch.tensor([[True, False, True, False]]))
    values = dispatch.compress(weight, bits)
    assert torch.equal(torch.signbit(values), torch.tensor([True, False]))
    back = dispatch.expand(values, bits, 4)
    assert torch.equal(torch.signbit(back), torch.tensor([[True, False, False, False]]))
    assert torch.equal(back, torch.zeros(1, 4, dtype=torch.bfloat16))


def test_outputs_do_not_depend_on_what_was_in_memory(backend, monkeypatch):
    """Every element is written: fresh tensors are filled with poison first."""
    real = torch.empty

    def poisoned(*size, **options):
        tensor = real(*size, **options)
        tensor.view(torch.uint8).fill_(0xFF) if tensor.numel() else None
        return tensor

    mask, weight = random_mask(9, 131), any_bits(9, 131, torch.float32)
    bits = torch.from_numpy(numpy_bits(mask))
    values = dispatch.compress(weight, bits)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert np.array_equal(dispatch.pack_bits(mask).numpy(), bits.numpy())
    assert torch.equal(dispatch.unpack_bits(bits, 131), mask)
    assert dispatch.row_counts(bits).tolist() == mask.sum(1).tolist()
    assert np.array_equal(integers(dispatch.compress(weight, bits)), integers(values))
    back = integers(dispatch.expand(values, bits, 131)).reshape(9, 131)
    assert np.array_equal(back, np.where(mask.numpy(), integers(weight).reshape(9, 131), 0))


def test_arguments_may_be_views(backend):
    weight, mask = torch.randn(130, 40).t(), random_mask(130, 40).t()
    bits = dispatch.pack_bits(mask)
    assert np.array_equal(bits.numpy(), numpy_bits(mask.contiguous()))
    wide = torch.zeros(40, 2 * bits.shape[1], dtype=torch.uint8)
    wide[:, ::2] = bits
    values = dispatch.compress(weight, wide[:, ::2])
    assert torch.equal(values, weight[mask])
    spread = torch.zeros(2 * len(values))
    spread[::2] = values
    assert torch.equal(dispatch.expand(spread[::2], wide[:, ::2], 130), weight * mask)
    parameter = torch.nn.Parameter(weight.clone())
    assert torch.equal(dispatch.compress(parameter, bits), values)


def test_unpack_ignores_bits_beyond_the_columns(backend):
    assert dispatch.unpack_bits(torch.tensor([[0xFF]], dtype=torch.uint8), 3).tolist() == [[True] * 3]


BITS = torch.tensor([[0b101]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispatch.pack_bits(torch.ones(2, 2)), "bool"),
        (lambda: dispatch.pack_bits(torch.ones(4, dtype=torch.bool)), r"\[rows, cols\]"),
        (lambda: dispatch.unpack_bits(BITS, 9), r"\[rows, 2\]"),
        (lambda: dispatch.unpack_bits(BITS.int(), 3), "uint8"),
        (lambda: dispatch.row_counts(BITS[0]), "uint8"),
        (lambda: dispatch.compress(torch.ones(1, 9), BITS), r"\[rows, 2\]"),
        (lambda: dispatch.compress(torch.ones(2, 3), BITS), "1 rows"),
        (lambda: dispatch.compress(torch.ones(3), BITS), "real"),
        (lambda: dispatch.compress(torch.ones(1, 3, dtype=torch.complex64), BITS), "real"),
        (lambda: dispatch.compress(torch.ones(1, 2), BITS), "beyond column 1"),
        (lambda: dispatch.expand(torch.ones(2), BITS, 2), "beyond column 1"),
        (lambda: dispatch.expand(torch.ones(1), BITS, 3), "1 values for 2 set bits"),
        (lambda: dispatch.expand(torch.ones(3), BITS, 3), "3 values for 2 set bits"),
        (lambda: dispatch.expand(torch.ones(1, 2), BITS, 3), "real"),
        (lambda: dispatch.expand(torch.ones(2, device="meta"), BITS, 3), "different devices"),
    ],
)
def test_what_does_not_fit_is_refused(backend, call, message):
    with pytest.raises(KernelError, match=message):
        call()


def test_the_compiled_code_never_writes_beyond_its_output():
    """Bits that promise more than the buffers hold, as if they changed after they were counted."""
    module = extension.compiled()
    if module is None:
        pytest.skip("no compiled module")
    bits = torch.full((3, 17), 0xFF, dtype=torch.uint8)
    weight = torch.ones(3, 136)
    values = torch.full((200,), 7.0)
    found = module.bitmask_compress(weight.data_ptr(), bits.data_ptr(), 3, 136, 4, values.data_ptr(), 150)
    assert found > 150
    assert values[150:].tolist() == [7.0] * 50
    out = torch.full((3 * 136 + 8,), 7.0)
    assert module.bitmask_expand(values.data_ptr(), bits.data_ptr(), 3, 136, 4, out.data_ptr(), 150) > 150
    assert out[3 * 136 :].tolist() == [7.0] * 8


@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_equals_reference(shape):
    mask, weight = random_mask(*shape, seed=5), any_bits(*shape, torch.bfloat16, seed=6)
    bits = reference.pack_bits(mask)
    values = reference.compress(weight, bits)
    assert torch.equal(dispatch.pack_bits(mask), bits)
    assert np.array_equal(integers(dispatch.compress(weight, bits)), integers(values))
    wanted = integers(reference.expand(values, bits, shape[1]))
    assert np.array_equal(integers(dispatch.expand(values, bits, shape[1])), wanted)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_environment_variable_forces_plain_torch():
    code = "import warnings; warnings.simplefilter('error')\nfrom gossamer.kernels.extension import compiled\n"
    code += "import torch\nfrom gossamer.kernels.bitmask.dispatch import pack_bits\n"
    code += "print(compiled() is None, pack_bits(torch.ones(1, 3, dtype=torch.bool)).tolist())"
    assert run(code, GOSSAMER_DISABLE_EXTENSION="1") == "True [[7]]"
    assert run(code, GOSSAMER_DISABLE_EXTENSION="0") == "False [[7]]"


@pytest.mark.parametrize("state", ["missing", "old"])
def test_without_a_usable_module_one_warning(state, monkeypatch):
    """A wheel without the compiled file, and one left over from an older version."""
    import types

    import gossamer.kernels

    monkeypatch.delenv(extension.VARIABLE, raising=False)
    stale = None if state == "missing" else types.ModuleType("gossamer.kernels._C")
    monkeypatch.setitem(sys.modules, "gossamer.kernels._C", stale)
    monkeypatch.delattr(gossamer.kernels, "_C", raising=False)
    if stale is not None:
        monkeypatch.setattr(gossamer.kernels, "_C", stale, raising=False)
    extension.compiled.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                assert dispatch.pack_bits(torch.ones(1, 3, dtype=torch.bool)).tolist() == [[7]]
        assert [w.category for w in caught] == [RuntimeWarning]
        assert "plain torch is used" in str(caught[0].message)
    finally:
        extension.compiled.cache_clear()
