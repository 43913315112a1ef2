"""Which tier runs: the processor decides, the environment overrules it; threads are torch's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.errors import KernelError
from gossamer.kernels import extension, tier

WITHOUT = extension.compiled() is None
needs_module = pytest.mark.skipif(WITHOUT, reason="no compiled module")


@pytest.fixture(autouse=True)
def _decide_anew():
    tier.current.cache_clear()
    yield
    tier.current.cache_clear()


@needs_module
def test_the_fastest_tier_is_the_default_and_scalar_always_exists(monkeypatch):
    monkeypatch.delenv(tier.VARIABLE, raising=False)
    names = list(tier.available())
    assert names == [name for name in tier.NAMES if name in names]
    assert names[-1] == "scalar"
    assert tier.current().name == names[0]


@needs_module
def test_every_available_tier_can_be_forced(monkeypatch):
    for name in tier.available():
        monkeypatch.setenv(tier.VARIABLE, name)
        tier.current.cache_clear()
        assert tier.current().name == name
        with tier.forced("scalar"):
            assert tier.current().name == "scalar"
            with tier.forced(None):
                assert tier.current() is None
        assert tier.current().name == name


def test_unknown_names_are_refused(monkeypatch):
    monkeypatch.setenv(tier.VARIABLE, "sse9")
    with pytest.raises(KernelError, match="'sse9', allowed: avx512bf16, avx512, avx2, neon, scalar"):
        tier.current()


@needs_module
def test_a_tier_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(tier, "available", lambda: {"scalar": None})
    monkeypatch.setenv(tier.VARIABLE, "avx2")
    with pytest.raises(KernelError, match="does not have; it has scalar"):
        tier.current()


def test_without_compiled_code_there_is_no_tier(monkeypatch):
    monkeypatch.setattr(tier, "available", dict)
    monkeypatch.delenv(tier.VARIABLE, raising=False)
    assert tier.current() is None


@needs_module
@pytest.mark.skipif(sys.platform != "linux", reason="threads come from torch's OpenMP on Linux only")
def test_threads_are_those_of_torch():
    """One OpenMP runtime in the process: the one that torch brought."""
    assert extension.compiled().parallel_runtime() == "openmp of torch"
    code = """
import os, torch
from gossamer.kernels.dense_gemv.dispatch import dense_gemv
weight = torch.randn(1024, 1024)
for _ in range(3):
    dense_gemv(torch.randn(1, 1024), weight)
with open("/proc/self/maps", encoding="utf-8") as maps:
    runtimes = {line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}
print(len({os.path.realpath(path) for path in runtimes}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"  # in a process of its own: scikit-learn brings another for itself


@needs_module
@pytest.mark.parametrize("name", tier.NAMES)
def test_the_environment_variable_in_a_process_of_its_own(launcher, name):
    if name not in tier.available():
        pytest.skip(f"no tier {name} here")
    code = (
        "import torch\nfrom gossamer.kernels import tier\nfrom gossamer.kernels.dense_gemv.dispatch import dense_gemv\n"
    )
    code += "print(tier.current().name, dense_gemv(torch.ones(1, 3), torch.ones(2, 3)).tolist())"
    done = launcher.run("--version", env={tier.VARIABLE: name}, before=code)
    assert done.stdout.splitlines()[0] == f"{name} [[3.0, 3.0]]", done.stderr


def test_no_code_is_shared_between_tiers():
    """A function that four tiers define under one name is one processor's code for all, whichever the linker keeps."""
    root = Path(__file__).resolve().parents[2]
    built = sorted(root.glob("build/cp*/**/tier_*.o"))
    if not built or shutil.which("nm") is None:
        pytest.skip("no object files of an installation from this folder, or no nm")
    listed = subprocess.run(["nm", "-C", *map(str, built)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listed.splitlines() if len(line.split(maxsplit=2)) == 3]
    assert any("(anonymous namespace)" in name for _, name in symbols)
    shared = {name for kind, name in symbols if kind in "WVu" and "(anonymous namespace)" not in name}
    assert shared == set()
