"""Triton kernels without a GPU: their results in the interpreter, and that they compile for NVIDIA and AMD GPUs.

The interpreter is chosen once per process, before Triton is imported, so the results are tested in one of their own.
Skipped where Triton is not installed: `make test-triton` installs it and runs this file.
"""

# ruff: noqa: E402 - without Triton, none of its kernels can be imported

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from gossamer.kernels import backend, gpu_plan
from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv import triton as bitmask_gpu
from gossamer.kernels.bitmask_gemv.dispatch import bitmask_gemv, describe, pack
from gossamer.kernels.channel_gemv import triton as channel_gpu
from gossamer.kernels.channel_gemv.dispatch import channel_gemv
from gossamer.kernels.dual_gemv import triton as dual_gpu
from gossamer.kernels.dual_gemv.gpu_layout import DualMatrix
from gossamer.kernels.neuron_mlp import triton as neuron_gpu
from gossamer.kernels.nm_gemv import dispatch as nm
from gossamer.kernels.nm_gemv import triton as nm_gpu

ONLY_COMPILED = pytest.mark.skipif(backend.interpreted(), reason="TRITON_INTERPRET is set: nothing is compiled")


@pytest.mark.timeout(1500)
def test_results_in_the_interpreter():
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


# ---- compiled, for devices that are not here ----

NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Compiles every kernel that a call would launch, with the arguments of that call, instead of launching it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: dict[str, Any] = {}

    def run(self: Any, *values: Any, grid: Any, warmup: bool, num_warps: int, **named: Any) -> None:
        given = {**dict(zip(self.arg_names, values, strict=False)), **named}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.params):
            name, value = parameter.name, given[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[name] = NAMES[value.dtype]
            elif parameter.is_constexpr or value == 1:  # as Triton does at a launch
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "i32"
            if isinstance(value, torch.Tensor) or (name not in constants and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self, signature, constants, attributes)
        found[self.__name__] = triton.compile(source, target=target[0], options={"num_warps": num_warps})

    target: list[Any] = []

    def compile_for(name: str, call: Callable[[], Any]) -> dict[str, Any]:
        target[:] = [GPUTarget(*TARGETS[name])]
        found.clear()
        call()
        return dict(found)

    monkeypatch.setattr(JITFunction, "run", run)
    return compile_for


def calls(batch: int, dtype: torch.dtype, rows: int = 64, cols: int = 2048) -> dict[str, Callable[[], Any]]:
    mask = torch.arange(rows * cols).view(rows, cols) % 4 < 2
    bits = bitmask.pack_bits(mask)
    kept = torch.zeros(int(mask.sum()), dtype=dtype)
    packed, slots = pack(bits, kept, cols), nm.pack(bits, kept, cols, 2, 4)
    x, few = torch.zeros(batch, cols, dtype=dtype), torch.zeros(batch, rows, dtype=dtype)
    dual = DualMatrix(torch.zeros(rows, 4, dtype=torch.int64), torch.zeros(rows, 4).int(), kept)
    weight, threshold, active = torch.zeros(rows, cols, dtype=dtype), torch.zeros(rows), torch.zeros(rows).int()
    return {
        "bitmask": lambda: bitmask_gpu.bitmask_gemv(x, batch, packed, describe(packed)),
        "2:4": lambda: nm_gpu.nm_gemv(x, batch, bits, slots, 2, 4),
        "channel": lambda: channel_gpu.channel_gemv(few, batch, weight, threshold),
        "dual": lambda: dual_gpu.dual_gemv(few, batch, dual, threshold, 256),
        "neuron": lambda: neuron_gpu.neuron_mlp(x, batch, weight, weight, weight, active),
    }


@ONLY_COMPILED
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("target", "batch", "rows", "cols"),
    [
        ("sm_80", 1, 64, 2048),
        ("sm_90", 8, 64, 2048),
        ("gfx942", 3, 64, 2048),
        ("sm_80", 1, 1, 1),
        ("sm_80", 1, 1, 4097),
    ],
)
def test_every_kernel_compiles(target, batch, rows, cols, compiled):
    """Lengths of 1 are constants to Triton, so they compile to other code."""
    for name, call in calls(batch, torch.bfloat16 if batch == 1 else torch.float16, rows, cols).items():
        kernels = compiled(target, call)
        assert kernels, name
        for kernel in kernels.values():
            code = "amdgcn" if target.startswith("gfx") else "ptx"
            assert kernel.asm[code]
            assert kernel.metadata.shared <= 48 << 10


@ONLY_COMPILED
def test_no_value_of_a_weight_goes_through_shared_memory(compiled):
    """Threads load what they multiply. A layout that the compiler must convert costs barriers in the inner loop."""
    for name, call in calls(1, torch.bfloat16).items():
        for kernel in compiled("sm_80", call).values():
            if kernel.metadata.name == "_list_active":  # reads no weight
                continue
            loop = kernel.asm["ptx"].partition("Loop Header")[2].partition("bra")[0]
            assert bool(loop) == (kernel.metadata.name != "add_splits"), "of splits, which are unrolled, there is none"
            assert "bar.sync" not in loop, (name, kernel.metadata.name)
            assert "st.shared" not in loop, (name, kernel.metadata.name)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_bits_of_whole_numbers_and_never_waits_for_the_host():
    from gemv_cases import exact, integers

    weight = integers(300, 1100, dtype=torch.bfloat16, seed=1, zeros=0.5)
    bits = bitmask.pack_bits(weight != 0)
    packed = pack(bits, bitmask.compress(weight, bits), 1100).cuda()
    weight_t, threshold = weight.t().contiguous().cuda(), torch.full((1100,), 2.0).cuda()
    for batch in (1, 3, 8):
        x = integers(batch, 1100, dtype=torch.bfloat16, seed=batch)
        on_gpu, kept = x.cuda(), x * (x.abs() > 2)
        for _ in range(2):  # the first call checks the packed tensor and compiles
            found = bitmask_gemv(on_gpu, packed, 300), channel_gemv(on_gpu, weight_t, threshold)
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found[0].cpu(), exact(x, weight))
        assert torch.equal(found[1].cpu(), exact(kept, weight))
    pairs = integers(300, 1100, dtype=torch.bfloat16, seed=1) * (torch.arange(1100) % 4 < 2)
    codes, values = bitmask.pack_bits(pairs != 0).cuda(), pairs[pairs != 0].view(300, -1)
    values = torch.cat([values, values.new_zeros(300, 2)], 1).cuda()  # 1100 columns are 137.5 bytes of codes
    assert torch.equal(nm.nm_gemv(on_gpu, codes, values, 2, 4).cpu(), exact(x, pairs))


# ---- how the work is cut: functions of the shape ----


def test_plans_cover_everything_once_and_fill_the_device():
    for items, width, programs in (
        (1, 8, 1),
        (32, 8, 1024),
        (32, 8, 256),
        (112, 8, 1024),
        (5, 8, 3),
        (0, 8, 7),
        (99, 4, 2),
    ):
        plan = gpu_plan.cut(items, width, programs)
        steps = max(1, -(-items // plan.width))
        assert plan.width <= width
        assert plan.splits * plan.share >= steps > (plan.splits - 1) * plan.share
        assert plan.splits == 1 or plan.splits * programs <= gpu_plan.PROGRAMS
    from gossamer.kernels.bitmask_gemv.layout import Shape

    assert bitmask_gpu.plan(Shape(4096, 4096)).splits == 1
    assert bitmask_gpu.plan(Shape(1024, 4096)).splits == 4
    assert channel_gpu.plan(4096, 4096).splits == 64
    assert nm_gpu.plan(1024, 512).splits == 4
    assert [gpu_plan.power_of_two(count) for count in (0, 1, 2, 3, 8, 9)] == [1, 1, 2, 4, 8, 16]
