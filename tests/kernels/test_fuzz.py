"""What the fuzz driver of kernels/csrc/fuzz found, and a short run of the driver itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.errors import KernelError
from gossamer.kernels import extension
from gossamer.kernels.bitmask_gemv import layout
from gossamer.kernels.bitmask_gemv.dispatch import describe
from gossamer.kernels.dual_gemv import layout as dual_layout
from gossamer.kernels.dual_gemv.dispatch import describe as describe_dual

needs_module = pytest.mark.skipif(extension.compiled() is None, reason="no compiled module")
LARGEST = (1 << 31) - 1


def header(rows: int, cols: int, nnz: int, size: int) -> torch.Tensor:
    """A packed tensor of `size` bytes with nothing but a header whose fields agree with each other."""
    packed = torch.zeros(size, dtype=torch.uint8)
    shape = layout.Shape(rows, cols)
    words = [layout.MAGIC, rows, cols, 1, nnz, shape.panel_cols, shape.stream, size]
    packed[:64].view(torch.int64)[:] = torch.tensor(words)
    return packed


@pytest.mark.parametrize("written", ["compiled", "torch"])
def test_a_length_beyond_64_bits_is_refused(written, monkeypatch):
    """The bytes of the largest matrix overflow a signed 64-bit number."""
    if written == "torch":
        monkeypatch.setattr("gossamer.kernels.bitmask_gemv.record.compiled", lambda: None)
    with pytest.raises(KernelError, match="length does not fit"):
        describe(header(LARGEST, LARGEST, LARGEST * LARGEST, 4096))


@pytest.mark.parametrize("nnz", [LARGEST * LARGEST, (1 << 63) - 1])
@pytest.mark.parametrize("written", ["compiled", "torch"])
def test_a_number_of_dual_values_beyond_64_bits_is_refused(written, nnz, monkeypatch):
    """Masks and values together overflowed before the values alone were found too many."""
    if written == "torch":
        monkeypatch.setattr("gossamer.kernels.dual_gemv.record.compiled", lambda: None)
    packed = torch.zeros(4096, dtype=torch.uint8)
    stream = dual_layout.Shape(LARGEST, LARGEST).stream
    words = [dual_layout.MAGIC, LARGEST, LARGEST, 1, nnz, dual_layout.PANEL, stream, 4096]
    packed[:64].view(torch.int64)[:] = torch.tensor(words)
    with pytest.raises(KernelError, match="number of values is out of range"):
        describe_dual(packed)


@needs_module
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(
    ("operation", "header"),
    [
        ("bitmask_gemv", [layout.MAGIC, LARGEST, 0, 1, 0, 128, 128, 192]),
        ("bitmask_gemv", [layout.MAGIC, LARGEST, 0, 2, 0, 128, 128, 192]),
        ("dual_gemv", [dual_layout.MAGIC, LARGEST, 0, 1, 0, 256, 64, 128]),
    ],
)
def test_rows_without_columns_ask_for_no_memory(launcher, operation, header):
    """A few bytes that claim two billion empty rows are a sound matrix, and unpacking it took 16 GB."""
    code = (
        f"import resource, torch\nfrom gossamer.kernels.{operation}.dispatch import unpack\n"
        f"words = {header} + [0] * {header[-1] // 8 - 8}\n"
        "packed = torch.tensor(words).view(torch.uint8)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "bits, values, cols = unpack(packed)\nprint(list(bits.shape), len(values), cols)"
    )
    done = launcher.run("--version", before=code)
    assert done.stdout.splitlines()[0] == f"[{LARGEST}, 0] 0 0", done.stderr


@needs_module
@pytest.mark.parametrize("dtype", [1, 3], ids=["bfloat16", "int8"])
def test_nothing_to_copy_has_no_address(dtype):
    """Empty tensors have address 0, which memcpy must not get even for no bytes; only UBSan sees it."""
    bits, scales = torch.zeros(3, 2, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.float16)
    packed = torch.full((extension.compiled().tiles_size(3, 10, 0, dtype),), 255, dtype=torch.uint8)
    assert torch.empty(0).data_ptr() == 0
    pack = extension.compiled().tiles_pack
    assert pack(bits.data_ptr(), 0, scales.data_ptr(), 0, 3, 10, dtype, packed.data_ptr())
    assert extension.compiled().tiles_fault(packed.data_ptr(), packed.numel()) is None
    assert packed[: 5 * 8].view(torch.int64).tolist() == [layout.MAGIC, 3, 10, dtype, 0]


def make(target: str, repository: Path, **variables: str) -> str:
    command = ["make", target, *(f"{name}={value}" for name, value in variables.items())]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def programs(*names: str) -> None:
    if missing := [name for name in names if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_thousand_mutated_inputs(repository):
    programs("make", "cmake", "c++")
    told = make("fuzz", repository, FUZZ_COUNT="2000")
    assert told.count("no finding") == 9
    for target in ("tiles", "int8", "dual", "arguments", "neuron", "csr", "entries", "window", "plain"):
        assert f"\n{target}: 2000 inputs" in told


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_neon_under_emulation(repository):
    programs("make", "cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
    told = make("cross-neon", repository)
    assert "tiers: neon scalar" in told
    assert told.count("no finding") == 9
