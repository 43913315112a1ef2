"""How a loaded model runs: what the caller asked for, what became of it, and our kernels in its ordinary modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..attention.block import shorten
from ..attention.decode import adopt_attention
from ..errors import KernelError, RecipeError
from ..kernels.backend import NAMES as BACKENDS
from ..kernels.backend import choose as choose_backend
from ..kernels.extension import compiled
from ..kernels.modules.bitmask_linear import BitmaskLinear
from ..kernels.modules.dense_linear import DenseLinear
from ..kernels.modules.int8_linear import Int8BitmaskLinear
from ..kernels.modules.packed_stack import PackedStack
from ..kernels.modules.sparse_linear import PREFILL
from .blockstep import shorten_block
from .norms import adopt_norms


@dataclass(frozen=True)
class RuntimeOptions:
    """How a loaded model runs. `packed`: matrices stay packed; otherwise ordinary layers with dense weights.

    `prefill`: how inputs of many rows see a packed matrix: "streamed" expands one layer at a time, "cached" keeps what
    was expanded. `backend`: what multiplies packed matrices: "cpu" (compiled code), "triton" (GPUs), "reference" (plain
    torch, slow), or "auto", which takes what fits the device. RecipeError for another word.
    """

    packed: bool = True
    prefill: str = "streamed"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise RecipeError(f"back end {self.backend!r}, allowed: auto, {', '.join(BACKENDS)}")
        if self.prefill not in PREFILL:
            raise RecipeError(f"prefill is {self.prefill!r}, allowed: {', '.join(PREFILL)}")


@dataclass
class Placed:
    """What was placed into a model, for reports: `model.gossamer_runtime`.

    `sparse`, `dense`: names of masked parameters that stay packed, and of those that are faster dense. `seconds`: spent
    on packing, of `dense_bytes`.
    """

    options: RuntimeOptions
    sparse: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    dense_bytes: int = 0
    packed_bytes: int = 0
    seconds: float = 0.0


_DEFAULT = RuntimeOptions()
_options: ContextVar[RuntimeOptions] = ContextVar("runtime_options", default=_DEFAULT)


def wanted_runtime() -> RuntimeOptions:
    """How models that are loaded now will run."""
    return _options.get()


@contextmanager
def runtime(options: RuntimeOptions) -> Iterator[None]:
    """Models loaded inside the block, in this thread, run with `options`."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def check_backend(model: Any, backend: str) -> None:
    """KernelError unless the wanted back end can run where the model lies."""
    kind = model.device.type
    if backend == "cpu" and (kind != "cpu" or compiled() is None):
        raise KernelError(f"back end 'cpu' needs the compiled kernels and a model on the CPU; this one is on {kind}")
    if backend == "triton" and choose_backend(kind) != "triton":
        raise KernelError(
            f"back end 'triton' needs a GPU and Triton; the model is on {kind}",
            hint="pip install 'gossamer[gpu]' and device_map='cuda'",
        )


def adopt(model: Any) -> None:
    """On the CPU, attention, norms and plain linear layers take our kernels for few tokens; nothing of it is saved."""
    adopt_attention(model)
    adopt_norms(model)
    for module in model.modules():
        shorten(module)
        shorten_block(module)
        if type(module) is nn.Linear and module.weight.is_cpu:
            DenseLinear.adopt(module)


def expand_modules(model: Any) -> None:
    """Ordinary layers with dense weights in place of all packed ones, one at a time."""
    for path, module in list(model.named_modules()):
        if type(module) in (BitmaskLinear, Int8BitmaskLinear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.expanded(Conv1D))
        elif isinstance(module, PackedStack):
            parent, _, child = path.rpartition(".")
            owner = model.get_submodule(parent)
            delattr(owner, child)
            owner.register_parameter(child, nn.Parameter(module.dense_weight()))
    model.gossamer_runtime = Placed(RuntimeOptions(packed=False))
