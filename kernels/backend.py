"""What runs an operation: compiled code for the processor, Triton kernels for a GPU, or the reference in plain torch.

The device of the tensors decides; GOSSAMER_BACKEND overrules it. Which compiled code runs is a question to `tier`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from ..errors import KernelError

VARIABLE = "GOSSAMER_BACKEND"
NAMES = ("cpu", "triton", "reference")


@cache
def choose(device: str) -> str:
    """One of NAMES for tensors on a type of device, "cpu" or "cuda" (AMD's GPUs too). Decided at the first call.

    Without Triton, or on another device, it is "reference"; on a GPU one warning says so. Raises KernelError when
    GOSSAMER_BACKEND names none of them, or one that cannot run on that device.
    """
    wanted = _forced[-1] if _forced else os.environ.get(VARIABLE, "")
    if wanted not in ("", "auto", *NAMES):
        raise KernelError(f"{VARIABLE} is {wanted!r}, allowed: auto, {', '.join(NAMES)}")
    if wanted in NAMES:
        _check(wanted, device)
        return wanted
    if device != "cuda":
        return "cpu" if device == "cpu" else "reference"
    if find_spec("triton") is not None:
        return "triton"
    warnings.warn(
        "Triton is not installed; plain torch is used on the GPU, which is slower than a dense model. Install it with: "
        "pip install 'gossamer[gpu]'",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


def _check(wanted: str, device: str) -> None:
    if wanted == "cpu" and device != "cpu":
        raise KernelError(f"the back end is forced to 'cpu', but the tensors are on {device}")
    if wanted == "triton":
        if find_spec("triton") is None:
            raise KernelError(
                "the back end is forced to 'triton', which is not installed", hint="pip install 'gossamer[gpu]'"
            )
        if device != "cuda" and not interpreted():
            raise KernelError(
                f"the back end is forced to 'triton', but the tensors are on {device}",
                hint="for tests, TRITON_INTERPRET=1 runs Triton kernels on the CPU, very slowly",
            )


def interpreted() -> bool:
    """Whether Triton's interpreter runs its kernels, on CPU tensors: TRITON_INTERPRET=1 before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def missing(operation: str) -> None:
    """To be called where an operation has no kernel for the GPU. Warns once per operation."""
    warnings.warn(
        f"{operation} has no kernel for GPUs; plain torch is used, which is slower than a dense layer",
        RuntimeWarning,
        stacklevel=3,
    )


_forced: list[str] = []


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside the block, back end `name`, or "auto", runs in every thread: for `load`, tests and measurements."""
    _forced.append(name)
    choose.cache_clear()
    try:
        yield
    finally:
        _forced.pop()
        choose.cache_clear()
