"""Packed matrices into the modules of a model while transformers loads it: sparse weights never exist as dense ones.

transformers insists on a tensor of the right shape for every parameter. It gets a stand-in without memory of its own
(one number, repeated by strides of zero), and after loading the module that holds it is replaced by a sparse one. The
peak of loading is therefore the packed size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, KernelError
from ..kernels.bitmask.dispatch import compress, row_counts
from ..kernels.bitmask_gemv.dispatch import pack
from ..kernels.choice import choose
from ..kernels.int8.dispatch import check_codes
from ..kernels.int8_gemv import dispatch as int8
from ..kernels.modules.bitmask_linear import BitmaskLinear
from ..kernels.modules.int8_linear import Int8BitmaskLinear
from ..kernels.modules.packed_stack import PackedStack
from ..kernels.modules.sparse_linear import SparseLinear
from .experts import EXPERTS
from .format import MatrixRecord, Scales, SourceMask
from .keymap import Group, KeyMap
from .parametermasks import converted_masks
from .runtime import Placed, adopt, wanted_runtime

STACKS = ("gate_up_proj", "up_proj", "down_proj")
HALVES = (torch.bfloat16, torch.float16)


class Placement:
    """Collects packed matrices by parameter name while a model is loaded, and puts them into it afterwards."""

    def __init__(self, model: Any, device_map: Any = None) -> None:
        self.options = wanted_runtime()
        self.placed = Placed(self.options)
        self._packed: dict[str, list[Tensor]] = {}
        self._int8: dict[str, torch.dtype] = {}  # compute dtype of the matrices with int8 values
        self._records: dict[str, MatrixRecord] = {}
        self._model = model
        wanted = self.options.packed and _one_device(device_map)
        self._names = set(_candidates(model)) if wanted else set()
        self._experts = set(_expert_parameters(model)) if wanted else set()

    def take(self, name: str, values: Tensor, mask: SourceMask, scales: Scales | None = None) -> Tensor | None:
        """Keeps the matrix, or the stack of experts, of parameter `name` packed and returns its stand-in.

        values: [nnz] in row order; int8 ones with `scales`. None where the parameter has to be dense, or is faster so.
        """
        if scales is not None:
            return self._take_int8(name, values, mask, scales)
        wanted = self._names if len(mask.record.shape) == 2 else self._experts
        if name not in wanted or values.dtype not in HALVES or not self._pays("bitmask", name, mask, values.dtype):
            return None
        return self._pack(name, mask, values)

    def _take_int8(self, name: str, values: Tensor, mask: SourceMask, scales: Scales) -> Tensor | None:
        if name not in self._names or not self._pays("int8", name, mask, scales.dtype):
            return None
        start = time.perf_counter()
        try:
            check_codes(values)
            packed = int8.pack(mask.bits, values.cpu(), scales.scales.cpu(), mask.record.cols).to(values.device)
        except KernelError as error:
            raise CheckpointError(f"tensor {name}: {error.message}", hint="the file is damaged") from error
        self._int8[name] = scales.dtype
        return self._keep(name, [packed], mask.record, scales.dtype, start)

    def _pays(self, op: str, name: str, mask: SourceMask, dtype: torch.dtype) -> bool:
        """Whether the sparse kernel is the faster one here, by measurement."""
        record = mask.record
        if self.options.backend == "reference":
            return True
        if not record.matrix_rows or not record.cols:
            return False
        density = record.nnz / math.prod(record.shape)
        sparse = choose(op, record.matrix_rows, record.cols, dtype, density).sparse
        if not sparse:
            self.placed.dense.append(name)
        return sparse

    def take_stacks(
        self, group: Group, made: dict[str, Any], keys: KeyMap, masks: Mapping[str, SourceMask]
    ) -> dict[str, Any]:
        """The parameters that a conversion made, those of masked experts kept packed and replaced by stand-ins."""
        wanted = [name for name in made if name in self._experts and made[name].dtype in HALVES]
        if not wanted or not any(key in masks for key in group.sources):
            return made
        found = converted_masks(self._model, keys, group, masks)
        for name in wanted:
            mask = found[name]
            if not self._pays("bitmask", name, mask, made[name].dtype):
                continue
            rows = mask.record.as_rows(made[name].cpu()).contiguous()
            made[name] = self._pack(name, mask, compress(rows, mask.bits).to(made[name].device))
        return made

    def _pack(self, name: str, mask: SourceMask, values: Tensor) -> Tensor:
        start = time.perf_counter()
        record, device = mask.record, values.device
        count = record.rows // record.matrix_rows if record.matrix_rows else 1
        matrices = mask.bits.view(count, record.matrix_rows, -1)
        sizes = [int(row_counts(bits).sum()) for bits in matrices]
        pieces = values.cpu().split(sizes)
        packed = [pack(bits, own, record.cols).to(device) for bits, own in zip(matrices, pieces, strict=True)]
        return self._keep(name, packed, record, values.dtype, start)

    def _keep(self, name: str, packed: list[Tensor], record: MatrixRecord, dtype: torch.dtype, start: float) -> Tensor:
        self._packed[name], self._records[name] = packed, record
        self.placed.packed_bytes += sum(matrix.nbytes for matrix in packed)
        self.placed.dense_bytes += math.prod(record.shape) * dtype.itemsize
        self.placed.seconds += time.perf_counter() - start
        return torch.zeros((), dtype=dtype, device=packed[0].device).expand(record.shape)

    def finish(self, model: Any) -> None:
        """Replace the modules whose matrices were taken, and let the other linear layers use our dense product."""
        for name, packed in self._packed.items():
            if name in self._experts:
                self._put_stack(model, name, packed)
            else:
                self._put_linear(model, name, packed[0])
            self.placed.sparse.append(name)
        if self._experts & self._packed.keys():
            model.set_experts_implementation(EXPERTS)
        if self._packed:
            _leave_file(model)
        if self.options.packed:
            adopt(model)
        model.gossamer_runtime = self.placed
        self._packed = {}

    def _put_linear(self, model: Any, name: str, packed: Tensor) -> None:
        path = name.removesuffix(".weight")
        parent, _, child = path.rpartition(".")
        before = model.get_submodule(path)
        how: dict[str, Any] = {"transposed": isinstance(before, Conv1D), "prefill": self.options.prefill}
        after: SparseLinear
        if name in self._int8:
            after = Int8BitmaskLinear(packed, before.bias, dtype=self._int8[name], **how)
        else:
            after = BitmaskLinear(packed, before.bias, **how)
        after.train(before.training)
        after.reference = self.options.backend == "reference"
        setattr(model.get_submodule(parent), child, after)

    def _put_stack(self, model: Any, name: str, packed: list[Tensor]) -> None:
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        delattr(module, parameter)
        transposed = self._records[name].transposed
        stack = PackedStack(packed, transposed=transposed, prefill=self.options.prefill)
        for member in stack.members:
            member.reference = self.options.backend == "reference"
        setattr(module, parameter, stack)

    def packed_masks(self, model: Any) -> dict[str, PackedMask]:
        """Masks of the placed matrices by parameter name, read from the modules when they are asked for."""
        paths = {name: name if name in self._experts else name.removesuffix(".weight") for name in self.placed.sparse}
        return {name: PackedMask(model.get_submodule(path), self._records[name]) for name, path in paths.items()}


@dataclass(frozen=True)
class PackedMask:
    """The mask of a packed module, without a second copy of its bits."""

    module: SparseLinear | PackedStack
    record: MatrixRecord

    def load(self) -> SourceMask:
        return SourceMask(self.module.bits(), self.record)


def _leave_file(model: Any) -> None:
    """Give the dense tensors memory of their own: as pieces of the mapped file they would keep all of it resident."""
    packed = {id(module.packed) for module in model.modules() if isinstance(module, SparseLinear)}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_cpu and tensor.numel() and id(tensor) not in packed:
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)


def _candidates(model: Any) -> Iterator[str]:
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    shared = {*tied, *tied.values()}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if type(module) in (nn.Linear, Conv1D) and name not in shared:
            yield name


def _expert_parameters(model: Any) -> Iterator[str]:
    """Stacked weights of experts that run through transformers' experts interface."""
    if not model._can_set_experts_implementation():
        return
    for path, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
            for name in STACKS:
                if isinstance(getattr(module, name, None), nn.Parameter):
                    yield f"{path}.{name}"


def _one_device(device_map: Any) -> bool:
    """Whether the whole model lies on one device: hooks that move weights between devices know nothing of ours."""
    if not isinstance(device_map, Mapping):
        return True
    devices = {str(device) for device in device_map.values()}
    return len(devices) == 1 and "disk" not in devices
