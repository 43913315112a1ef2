"""LoRA of peft on dense layers that have a mask, as a model loaded in float32 has them: a merge keeps the zeros."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..kernels.bitmask.dispatch import unpack_bits
from .lora_merging import Undoable, tell_lost, way


class MaskedLoraLinear(lora.Linear, Undoable):
    """peft's LoRA, in all its variants, around a layer whose weight is pruned. Only merging differs.

    Made by `adopt` from peft's own layer, which knows nothing of the model's masks.

    Attributes:
        bits: the mask as packed rows, uint8 [out, ceil(in / 8)].
    """

    bits: Tensor
    _before: list[tuple[Tensor, Tensor | None]]

    @classmethod
    def adopt(cls, layer: lora.Linear, bits: Tensor) -> None:
        """`layer` itself is of this class from now on."""
        layer.__class__ = cls
        layer.bits, layer._before = bits, []  # type: ignore[assignment]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft does it; pruned weights stay as they are, or KernelError: see `merging`."""
        base: Any = self.get_base_layer()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            count = len(self.merged_adapters)
            self._before.append((base.weight.data.clone(), None if base.bias is None else base.bias.data.clone()))
            try:
                super().merge(safe_merge, [adapter])
                self._keep_zeros(adapter)
            except BaseException:
                del self.merged_adapters[count:]
                self._restore()
                raise

    def unmerge(self) -> None:
        """The layer as it was before the merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.take_back(0)

    def take_back(self, count: int) -> None:
        while len(self.merged_adapters) > count:
            self.merged_adapters.pop()
            self._restore()

    def _restore(self) -> None:
        base: Any = self.get_base_layer()
        weight, bias = self._before.pop()
        base.weight.data.copy_(weight)
        if bias is not None:
            base.bias.data.copy_(bias)

    def _keep_zeros(self, adapter: str) -> None:
        if way() == "dense":
            return
        base: Any = self.get_base_layer()
        new, old = base.weight.data, self._before[-1][0]
        if self.fan_in_fan_out:
            new, old = new.t(), old.t()
        pruned = ~unpack_bits(self.bits.cpu(), new.shape[1]).to(new.device)
        change = new.float() - old.float()
        tell_lost(adapter, change.masked_fill(~pruned, 0.0), change)
        new[pruned] = old[pruned]


def adopt_masked(model: nn.Module) -> None:
    """Every LoRA layer of peft around a dense weight that has a mask in `model.gossamer_masks` learns of it."""
    masks = getattr(model, "gossamer_masks", None) or {}
    for name, layer in model.named_modules():
        if type(layer) is lora.Linear and f"{name}.weight" in masks:
            MaskedLoraLinear.adopt(layer, masks[f"{name}.weight"].bits)
