"""Which back end runs: the device decides, the environment and `forced` overrule it, each impossible wish has words."""

from __future__ import annotations

import warnings

import pytest
import torch

from gossamer.errors import KernelError
from gossamer.kernels import backend
from gossamer.kernels.active import cpu
from gossamer.kernels.channel_gemv import reference
from gossamer.kernels.channel_gemv.dispatch import channel_gemv
from gossamer.kernels.dense_gemv.dispatch import dense_gemv


@pytest.fixture(autouse=True)
def _decide_anew(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.choose.cache_clear()
    yield
    backend.choose.cache_clear()


def with_triton(monkeypatch, there: bool) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: object() if there else None)


def test_the_device_decides(monkeypatch):
    with_triton(monkeypatch, True)
    assert [backend.choose(device) for device in ("cpu", "cuda", "mps")] == ["cpu", "triton", "reference"]


def test_without_triton_a_gpu_runs_the_reference_and_one_warning_says_so(monkeypatch):
    with_triton(monkeypatch, False)
    with pytest.warns(RuntimeWarning, match=r"Triton is not installed.*gossamer\[gpu\]"):
        assert backend.choose("cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("cuda") == "reference"
        assert backend.choose("cpu") == "cpu"


def test_the_environment_and_forced_overrule_it(monkeypatch):
    with_triton(monkeypatch, True)
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert backend.choose("cpu") == backend.choose("cuda") == "reference"
    with backend.forced("triton"):
        assert backend.choose("cuda") == "triton"
        with backend.forced("auto"):
            assert backend.choose("cpu") == "cpu"
    assert backend.choose("cpu") == "reference"


@pytest.mark.parametrize(
    ("wanted", "device", "there", "message"),
    [
        ("gpu", "cpu", True, "is 'gpu', allowed: auto, cpu, triton, reference"),
        ("cpu", "cuda", True, "forced to 'cpu', but the tensors are on cuda"),
        ("triton", "cuda", False, "'triton', which is not installed.*gossamer"),
        ("triton", "cpu", True, "'triton', but the tensors are on cpu.*TRITON_INTERPRET=1"),
    ],
)
def test_what_cannot_be_is_refused(wanted, device, there, message, monkeypatch):
    with_triton(monkeypatch, there)
    monkeypatch.setenv(backend.VARIABLE, wanted)
    with pytest.raises(KernelError, match=message):
        backend.choose(device)


def test_operations_follow(monkeypatch):
    seen = []
    real = reference.channel_gemv
    monkeypatch.setattr(reference, "channel_gemv", lambda *tensors: seen.append("reference") or real(*tensors))
    monkeypatch.setattr(cpu, "active_gemv", lambda *tensors: seen.append("cpu"))
    x, weight_t, threshold = torch.ones(1, 4), torch.ones(4, 2), torch.zeros(4)
    with backend.forced("reference"):
        assert channel_gemv(x, weight_t, threshold).tolist() == [[4.0, 4.0]]
        assert seen == ["reference"]
        assert dense_gemv(x, weight_t.t().contiguous()).tolist() == [[4.0, 4.0]]


def test_an_operation_without_a_kernel_says_so_once():
    backend.missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="int8_gemv has no kernel for GPUs"):
        backend.missing("int8_gemv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.missing("int8_gemv")
    backend.missing.cache_clear()
