"""Training and merging beside weights that bitsandbytes quantised.

On processors with AVX512-BF16, the first 4-bit product without gradients repacks the weight in place for a kernel that
has no backward pass, and never packs it back: afterwards gradients of the inputs are None and a dequantised weight is
garbage. Whoever trains or merges on the CPU keeps the weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError

SAMPLE = 4096  # entries of a weight that tell it from others
OUTLIERS = 6.0  # int8 on GPUs: inputs beyond this are multiplied in 16 bits, as transformers has it too


@dataclass(frozen=True)
class Origin:
    """What `quantise` remembers of the layer that it replaced.

    Attributes:
        sample: `sample_of` its weight.
        transposed: the weight was stored [in, out], as transformers' Conv1D does; the quantised one is [out, in].
    """

    sample: Tensor
    transposed: bool


@torch.no_grad()
def quantise(model: nn.Module, names: Iterable[str], kind: str, dtype: torch.dtype) -> None:
    """Replace these linear layers of `model` by frozen ones of bitsandbytes, one at a time, each on its own device.

    Zeros stay zeros: 0.0 is a code of nf4, fp4 and int8.

    Args:
        names: of torch.nn.Linear or transformers' Conv1D modules, with float weights.
        kind: "nf4" or "fp4" (blocks of 64 with scales in 8 bits: double quantisation), "int8" (a scale per output).
        dtype: in which products are computed.
    """
    for name in names:
        holder, _, own = name.rpartition(".")
        parent = model.get_submodule(holder)
        setattr(parent, own, _quantised(getattr(parent, own), kind, dtype))


def _quantised(layer: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes.nn
    weight, transposed = layer.weight.data, isinstance(layer, Conv1D)
    rows = (weight.t() if transposed else weight).contiguous()
    sizes: dict[str, Any] = {"input_features": rows.shape[1], "output_features": rows.shape[0], "bias": False}
    made: Any
    if kind == "int8":
        made = bnb.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        made.weight = bnb.Int8Params(rows, requires_grad=False, has_fp16_weights=False).to(rows.device)
    else:
        made = bnb.Linear4bit(**sizes, compute_dtype=dtype, quant_type=kind, device="meta")
        made.weight = bnb.Params4bit(
            rows, requires_grad=False, compress_statistics=True, quant_type=kind, module=made
        ).to(rows.device)
        made.support_avx512bf16_for_cpu = False
    made.bias = layer.bias
    made.origin = Origin(sample_of(weight), transposed)
    return made.train(layer.training)


def origin_of(layer: nn.Module) -> Origin | None:
    """What `quantise` remembers; None for a layer that it did not make."""
    return getattr(layer, "origin", None)


def sample_of(weight: Tensor) -> Tensor:
    """`SAMPLE` entries, evenly spread, as bfloat16 on the CPU: of a weight in float32 those of its bfloat16 copy."""
    flat = weight.detach().reshape(-1)
    # A copy also of what is bfloat16 already: a view would keep the whole weight in memory.
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to("cpu", torch.bfloat16, copy=True).contiguous()


class Dequantised(nn.Linear):
    """A float32 layer in a model of any dtype: what it gives back has the dtype of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


def plain(layer: Any) -> nn.Linear:
    """An ordinary layer with the float32 matrix that a quantised one stands for, and its bias."""
    weight = dequantised(layer)
    made = Dequantised(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)


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
