"""LoRA of peft on layers that hold packed weights: trained as on any layer, merged exactly or not at all.

peft's own LoRA layer adds the product of its factors to `base_layer.weight.data`, which a packed layer does not have.
Here a merge reaches the packed values, or refuses: a product of thin factors is dense, so that what it does to pruned
weights cannot be kept in a sparse layer. `merging("masked")` drops that part, `merging("dense")` makes ordinary layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import KernelError, RecipeError
from ..kernels.bitmask.dispatch import unpack_bits
from ..kernels.modules.sparse_linear import SparseLinear

MERGES = ("refuse", "masked", "dense")
_HOW: ContextVar[str] = ContextVar("merge of adapters on sparse layers", default="refuse")


@contextmanager
def merging(how: str) -> Iterator[None]:
    """Inside, adapters are merged into sparse layers in this way.

    "refuse": KernelError if the adapter changes pruned weights. "masked": those changes are dropped, a warning says how
    much of the adapter that is. "dense": the layer becomes an ordinary one, and the model dense there.
    """
    if how not in MERGES:
        raise RecipeError(f"merge {how!r} is unknown; allowed: {', '.join(MERGES)}")
    token = _HOW.set(how)
    try:
        yield
    finally:
        _HOW.reset(token)


class SparseLoraLinear(lora.Linear):
    """peft's LoRA around a SparseLinear. Only merging differs; variants such as DoRA are refused."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # peft does not know the layer's type, and takes its sizes from it all the same
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self._before: list[tuple[Any, Tensor | None]] = []

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        variant = self.resolve_lora_variant(config=kwargs["config"])
        if variant is not None:  # before it reads weights that are not there
            raise RecipeError(
                f"{type(variant).__name__} is not possible on a sparse layer",
                hint="use plain LoRA, or load the model with gossamer.load(..., packed=False)",
            )
        super().update_layer(adapter_name, *args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Into the packed values (or a dense layer): sums in float32, rounded once to the layer's dtype."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                self._merge_one(adapter, safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """The layer as it was before the merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.lora_A:
                saved, bias = self._before.pop()
                if isinstance(saved, nn.Module):
                    self.base_layer = saved
                else:
                    self.base_layer.packed = saved
                if bias is not None:
                    self.base_layer.bias.data = bias

    def _merge_one(self: Any, adapter: str, check: bool) -> None:
        base: Any = self.get_base_layer()
        thin: tuple[Tensor, Tensor] = self.lora_B[adapter].weight, self.lora_A[adapter].weight  # type: ignore[assignment]
        delta = self.scaling[adapter] * (thin[0].float() @ thin[1].float())
        if check and not bool(torch.isfinite(delta).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        bias = self._merge_bias(adapter, base)
        if not isinstance(base, SparseLinear):  # made dense by an earlier merge
            self._before.append((_copy(base), bias))
            matrix = base.weight.data.t() if isinstance(base, Conv1D) else base.weight.data
            matrix.copy_(matrix.float() + delta)
            return
        if _HOW.get() == "dense":
            self._before.append((base, bias))
            self.base_layer = base.expanded(Conv1D)
            matrix = self.base_layer.weight.data
            matrix = matrix.t() if base.transposed else matrix
            matrix.copy_(matrix.float() + delta)
            return
        keep = unpack_bits(base.bits().cpu(), base.in_features).to(delta.device)
        lost = delta.masked_fill(keep, 0.0)
        if bool(lost.any()):
            self._tell_lost(adapter, lost, delta)
        weight = base.dense_weight()
        weight = weight.t() if base.transposed else weight
        merged = (weight.float() + delta).masked_fill_(~keep, 0.0).to(base.dtype)
        saved = base.packed
        fault = base.take((merged.t() if base.transposed else merged).contiguous())
        if fault is not None:
            raise KernelError(
                f"the adapter {adapter} cannot be merged into a {type(base).__name__}: it would have {fault}",
                hint='`with gossamer.merging("dense"):` makes an ordinary layer of it',
            )
        self._before.append((saved, bias))

    def _merge_bias(self, adapter: str, base: Any) -> Tensor | None:
        """Adds the adapter's bias; what the bias was before, or None."""
        if not self.lora_bias[adapter]:
            return None
        if base.bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        before = base.bias.data
        base.bias.data = (before.float() + self.scaling[adapter] * self.lora_B[adapter].bias.float()).to(before.dtype)
        return before

    def _tell_lost(self, adapter: str, lost: Tensor, delta: Tensor) -> None:
        share = float(lost.norm() ** 2 / delta.norm() ** 2)
        what = f"the adapter {adapter} changes pruned weights: {100 * share:.0f} % of its squared norm"
        if _HOW.get() == "refuse":
            raise KernelError(
                f"{what} would be lost in a sparse layer",
                hint='keep it unmerged, or choose: `with gossamer.merging("masked"):` drops that part, "dense" makes '
                "ordinary layers",
            )
        warnings.warn(f"{what} is dropped by the merge", stacklevel=5)


def register() -> None:
    """Every LoraConfig from now on knows sparse layers. Idempotent; a warning where peft is not as known."""
    config: Any = peft.LoraConfig
    if getattr(config, "_knows_sparse_layers", False):
        return
    if not hasattr(config, "_register_custom_module"):
        warnings.warn(f"peft {peft.__version__} has no custom LoRA layers: none on sparse ones", stacklevel=2)
        return
    usual = config.__post_init__

    def finish(self: Any) -> None:
        usual(self)
        self._register_custom_module({SparseLinear: SparseLoraLinear})

    config.__post_init__ = finish
    config._knows_sparse_layers = True


def _copy(layer: nn.Module) -> nn.Module:
    """The layer with a weight of its own."""
    import copy

    return copy.deepcopy(layer)
