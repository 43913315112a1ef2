"""Training and merging beside weights that bitsandbytes quantised.

On processors with AVX512-BF16, the first 4-bit product without gradients repacks the weight in place for a kernel that
has no backward pass, and never packs it back: afterwards gradients of the inputs are None and a dequantised weight is
garbage. Whoever trains or merges on the CPU keeps the weights as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


def keep_unpacked(model: nn.Module) -> int:
    """Forbid the repacking of every 4-bit layer of `model`, undo it where it has happened; the number of such layers.

    Repacking rounds the scales to bfloat16, so what is undone differs from the original by up to 0.4 %. ModelError when
    a repacked weight cannot be packed back.
    """
    layers = [layer for layer in model.modules() if is_4bit(layer)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        if getattr(_state(layer), "packing_format_for_cpu", False):
            _unpack(layer)
    return len(layers)


def is_4bit(layer: nn.Module) -> bool:
    """Whether it is bitsandbytes' 4-bit layer; without importing bitsandbytes."""
    return any(kind.__name__ == "Linear4bit" and "bitsandbytes" in kind.__module__ for kind in type(layer).__mro__)


def is_quantised(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds its weight in 4 or 8 bits."""
    return any(
        kind.__name__ in ("Linear4bit", "Linear8bitLt") and "bitsandbytes" in kind.__module__
        for kind in type(layer).__mro__
    )


@torch.no_grad()
def dequantised(layer: Any) -> Tensor:
    """The float32 matrix [out, in] that a quantised layer stands for. ModelError for any other layer."""
    if is_4bit(layer):
        from bitsandbytes.functional import dequantize_4bit

        if getattr(_state(layer), "packing_format_for_cpu", False):
            _unpack(layer)
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if is_quantised(layer):
        weight = layer.weight
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        rows = weight.data if weight.data.dtype is torch.int8 else layer.state.CB
        return rows.float() * (scales.float().unsqueeze(1) / 127.0)
    raise ModelError(f"{type(layer).__name__} is not a layer that bitsandbytes quantised")


def _state(layer: Any) -> Any:
    return getattr(layer.weight, "quant_state", None)


def _unpack(layer: Any) -> None:
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as inverse
    except ImportError as error:
        raise ModelError(
            "this version of bitsandbytes repacked a 4-bit weight and cannot pack it back",
            hint="train or merge before the first evaluation, or load the model anew",
        ) from error
    weight, state = inverse(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state, layer.quant_state = weight, state, state
