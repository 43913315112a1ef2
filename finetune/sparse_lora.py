"""LoRA of peft on layers that hold packed weights: trained as on any layer, merged exactly or not at all.

peft's own LoRA layer adds the product of its factors to `base_layer.weight.data`, which a packed layer does not have.
Here a merge reaches the packed values, or refuses: a product of thin factors is dense, so that what it does to pruned
weights cannot be kept in a sparse layer. `merging("masked")` drops that part, `merging("dense")` makes ordinary layers.
Dense layers with a mask are kept by `masked_lora`.
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import KernelError, RecipeError
from ..kernels.bitmask.dispatch import unpack_bits
from ..kernels.modules.sparse_linear import SparseLinear
from .lora_merging import Undoable, check_merges, merging, tell_lost, way
from .masked_lora import adopt_masked
from .spiel.targets import include_packed

__all__ = ["SparseLoraLinear", "merging", "register"]

# inits that leave the weights as they are; all others take something out of them, or read them as one dense matrix
_INITS = ("gaussian", "orthogonal", "eva")


class SparseLoraLinear(lora.Linear, Undoable):
    """peft's LoRA around a SparseLinear. Only merging differs; variants (DoRA) and inits (PiSSA) are refused."""

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
        check_init(kwargs["config"])
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
        self.take_back(0)

    def take_back(self: Any, count: int) -> None:
        while len(self.merged_adapters) > count:
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
        if self.lora_bias[adapter] and base.bias is None:
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        thin: tuple[Tensor, Tensor] = self.lora_B[adapter].weight, self.lora_A[adapter].weight  # type: ignore[assignment]
        delta = self.scaling[adapter] * (thin[0].float() @ thin[1].float())
        if check and not bool(torch.isfinite(delta).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        saved = self._add(base, delta, adapter)
        self._before.append((saved, self._merge_bias(adapter, base)))

    def _add(self: Any, base: Any, delta: Tensor, adapter: str) -> Any:
        """Adds `delta` to the layer's matrix; the packed values or the layer that were there before."""
        if not isinstance(base, SparseLinear):  # made dense by an earlier merge
            before = _copy(base)
            matrix = base.weight.data.t() if isinstance(base, Conv1D) else base.weight.data
            matrix.copy_(matrix.float() + delta)
            return before
        if way() == "dense":
            self.base_layer = base.expanded(Conv1D)
            matrix = self.base_layer.weight.data
            matrix = matrix.t() if base.transposed else matrix
            matrix.copy_(matrix.float() + delta)
            return base
        keep = unpack_bits(base.bits().cpu(), base.in_features).to(delta.device)
        tell_lost(adapter, delta.masked_fill(keep, 0.0), delta)
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
        return saved

    def _merge_bias(self, adapter: str, base: Any) -> Tensor | None:
        """Adds the adapter's bias; what the bias was before, or None."""
        if not self.lora_bias[adapter]:
            return None
        before: Tensor = base.bias.data
        base.bias.data = (before.float() + self.scaling[adapter] * self.lora_B[adapter].bias.float()).to(before.dtype)
        return before


def check_init(config: Any) -> None:
    """RecipeError for an init of the factors that takes its part out of the weights: pruned ones would come back."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _INITS:
        raise RecipeError(
            f"init_lora_weights {init!r} is not possible on a sparse model: it changes the weights below the adapter",
            hint=f"allowed: True, False, {', '.join(map(repr, _INITS))}",
        )


def register() -> None:
    """Every LoraConfig from now on knows sparse layers, and LoraModel masks. Idempotent; a warning where peft is not as
    known."""
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
    _extend(LoraModel)


def _extend(kind: Any) -> None:
    """Around peft's own: which layers are meant, what is refused, and all of that before the first layer changes."""
    inject, merge, unload = kind.inject_adapter, kind.merge_adapter, kind._unload_and_optionally_merge

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **more: Any) -> None:
        if type(self) is kind:
            config = self.peft_config[adapter_name]
            if getattr(model, "gossamer_masks", None):
                check_init(config)
            include_packed(config, model)
        inject(self, model, adapter_name, *args, **more)
        adopt_masked(model)

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        check_merges(self.model, safe_merge, adapter_names)
        merge(self, adapter_names, safe_merge)

    def unload_and_optionally_merge(
        self: Any, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        if merge:
            check_merges(self.model, safe_merge, adapter_names)
        return unload(self, merge, progressbar, safe_merge, adapter_names)

    kind.inject_adapter, kind.merge_adapter = inject_adapter, merge_adapter
    kind._unload_and_optionally_merge = unload_and_optionally_merge


def _copy(layer: nn.Module) -> nn.Module:
    """The layer with a weight of its own."""
    import copy

    return copy.deepcopy(layer)
