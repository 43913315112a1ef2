"""Packed matrices into the modules of a model while transformers loads it: sparse weights never exist as dense ones.

transformers insists on a tensor of the right shape for every parameter. It gets a stand-in without memory of its own
(one number, repeated by strides of zero), and after loading the module that holds it is replaced by a sparse one. The
peak of loading is therefore the packed size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import RecipeError
from ..kernels.bitmask_gemv.dispatch import pack
from ..kernels.modules.bitmask_linear import PREFILL, BitmaskLinear
from ..kernels.modules.dense_linear import DenseLinear
from .format import SourceMask

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RuntimeOptions:
    """How a loaded model runs. `packed`: matrices stay packed; otherwise ordinary layers with dense weights.

    `prefill`: how inputs of many rows see a packed matrix: "streamed" expands one layer at a time, "cached" keeps what
    was expanded. RecipeError for another word.
    """

    packed: bool = True
    prefill: str = "streamed"

    def __post_init__(self) -> None:
        if self.prefill not in PREFILL:
            raise RecipeError(f"prefill is {self.prefill!r}, allowed: {', '.join(PREFILL)}")


@dataclass
class Placed:
    """What was placed into a model, for reports: `model.gossamer_runtime`."""

    options: RuntimeOptions
    sparse: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    dense_bytes: int = 0
    packed_bytes: int = 0
    seconds: float = 0.0


_DEFAULT = RuntimeOptions()
_options: ContextVar[RuntimeOptions] = ContextVar("runtime_options", default=_DEFAULT)


@contextmanager
def runtime(options: RuntimeOptions) -> Iterator[None]:
    """Models loaded inside the block, in this thread, run with `options`."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


class Placement:
    """Collects packed matrices by parameter name while a model is loaded, and puts them into it afterwards."""

    def __init__(self, model: Any, device_map: Any = None) -> None:
        self.options = _options.get()
        self.placed = Placed(self.options)
        self._packed: dict[str, Tensor] = {}
        self._records: dict[str, Any] = {}
        self._names = set(_candidates(model)) if self.options.packed and _one_device(device_map) else set()

    def take(self, name: str, values: Tensor, mask: SourceMask) -> Tensor | None:
        """Keeps the matrix of parameter `name` packed and returns its stand-in; None where it has to be dense."""
        record = mask.record
        if name not in self._names or values.dtype not in HALVES or len(record.shape) != 2:
            return None
        start = time.perf_counter()
        packed = pack(mask.bits, values.cpu(), record.cols).to(values.device)
        self.placed.seconds += time.perf_counter() - start
        self.placed.packed_bytes += packed.nbytes
        self.placed.dense_bytes += record.shape[0] * record.shape[1] * values.element_size()
        self._packed[name], self._records[name] = packed, record
        return torch.zeros((), dtype=values.dtype, device=values.device).expand(record.shape)

    def finish(self, model: Any) -> None:
        """Replace the modules whose matrices were taken, and let the other linear layers use our dense product."""
        for name, packed in self._packed.items():
            path = name.removesuffix(".weight")
            parent, _, child = path.rpartition(".")
            before = model.get_submodule(path)
            after = BitmaskLinear(
                packed, before.bias, transposed=isinstance(before, Conv1D), prefill=self.options.prefill
            )
            after.train(before.training)
            setattr(model.get_submodule(parent), child, after)
            self.placed.sparse.append(name)
        if self.options.packed:
            adopt_dense(model)
        model.gossamer_runtime = self.placed
        self._packed = {}

    def packed_masks(self, model: Any) -> dict[str, PackedMask]:
        """Masks of the placed matrices by parameter name, read from the modules when they are asked for."""
        return {
            name: PackedMask(model.get_submodule(name.removesuffix(".weight")), self._records[name])
            for name in self.placed.sparse
        }


@dataclass(frozen=True)
class PackedMask:
    """The mask of a packed module, without a second copy of its bits."""

    module: BitmaskLinear
    record: Any

    def load(self) -> SourceMask:
        return SourceMask(self.module.bits(), self.record)


def adopt_dense(model: Any) -> None:
    """Plain linear layers on the CPU take our product for few tokens; only their class changes."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.is_cpu:
            DenseLinear.adopt(module)


def expand_modules(model: Any) -> None:
    """Ordinary layers with dense weights in place of all packed ones, one at a time."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BitmaskLinear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.expanded(Conv1D))
    model.gossamer_runtime = Placed(RuntimeOptions(packed=False))


def _candidates(model: Any) -> Iterator[str]:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    shared = {*tied, *tied.values()}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if type(module) in (nn.Linear, Conv1D) and name not in shared:
            yield name


def _one_device(device_map: Any) -> bool:
    """Whether the whole model lies on one device: hooks that move weights between devices know nothing of ours."""
    if not isinstance(device_map, Mapping):
        return True
    devices = {str(device) for device in device_map.values()}
    return len(devices) == 1 and "disk" not in devices
