"""Whether compiled code may stand in for something that torch would do, on the CPU, at this moment."""

from __future__ import annotations

import torch

from .backend import choose
from .tier import current


def cpu_ready() -> bool:
    """No gradient is recorded, no compiler or tracer looks on, and there is compiled code that may be used."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and choose("cpu") == "cpu"
        and current() is not None
    )
