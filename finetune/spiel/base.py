"""What a sparse delta needs to know of the layer below it: shape, orientation, whether its weight is a plain one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import ModelError
from ...kernels.modules.sparse_linear import SparseLinear
from ..quantised import origin_of, sample_of

UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Base:
    """Facts of one adapted layer.

    Attributes:
        rows, cols: out and in.
        transposed: the weight is stored [in, out], as transformers' Conv1D does.
        quantization: peft's backend object of a quantised layer, else None.
        plain: a torch.nn.Linear that nothing was done to: its weight may be read and copied.
    """

    rows: int
    cols: int
    transposed: bool
    quantization: Any
    plain: bool


def describe(layer: nn.Module, **options: Any) -> Base:
    """The facts of `layer`. `options` are passed to peft's `resolve_quantization_backend`.

    Raises:
        ModelError: not a linear layer.
    """
    quantization = resolve_quantization_backend(layer, **options)
    if isinstance(layer, Conv1D):
        return Base(layer.weight.shape[1], layer.weight.shape[0], True, None, False)
    if isinstance(layer, SparseLinear):
        return Base(layer.out_features, layer.in_features, layer.transposed, None, False)
    if isinstance(layer, nn.Linear) or (quantization is not None and quantization.layer_type == "linear"):
        plain = type(layer) is nn.Linear and quantization is None
        return Base(int(layer.out_features), int(layer.in_features), False, quantization, plain)  # type: ignore[arg-type]
    raise ModelError(
        f"a sparse delta needs a linear layer, got {type(layer).__name__}",
        hint="name linear layers in target_modules; embeddings and norms can be trained through modules_to_save",
    )


def has_hooks(layer: nn.Module) -> bool:
    """Whether something runs when the layer is called, which a product with its bare weight would pass by."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def writable_weight(layer: nn.Module, base: Base, name: str) -> Tensor:
    """The weight that merging writes into.

    Raises:
        ModelError: it is quantised or packed, so that a sum would be rounded again, or lost.
    """
    if base.quantization is not None:
        raise ModelError(
            f"{name} is quantised ({base.quantization.backend_name}); merging into it would quantise again",
            hint="load the model without quantisation and merge there, or keep the adapter beside it",
        )
    if isinstance(layer, SparseLinear):
        raise ModelError(
            f"{name} is a packed sparse layer; a delta cannot be merged into it",
            hint="gossamer adapter merge writes a new checkpoint, or load the model densified",
        )
    weight: Tensor = layer.weight.data  # type: ignore[assignment,union-attr]
    return weight


def fingerprints(layers: Iterable[tuple[str, nn.Module, Base]]) -> tuple[str, dict[str, str]]:
    """Digest of names, shapes and a sample of the weights rounded to bfloat16: of all layers, and of each, shortened.

    The same in float32 and bfloat16, so an adapter of one loads on the other; of layers that `quantise` replaced, that
    of the weights before. (UNCHECKED, {}) where a weight is not readable.
    """
    digest, each = hashlib.sha256(), {}
    for name, layer, base in layers:
        origin = origin_of(layer)
        if origin is None and (base.quantization is not None or isinstance(layer, SparseLinear)):
            return UNCHECKED, {}
        if origin is None and layer.weight.device.type == "meta":  # type: ignore[union-attr]
            return UNCHECKED, {}
        taken = sample_of(layer.weight) if origin is None else origin.sample  # type: ignore[arg-type]
        said = f"{name} {base.rows} {base.cols};".encode() + taken.view(torch.int16).numpy().tobytes()
        digest.update(said)
        each[name] = hashlib.sha256(said).hexdigest()[:16]
    return digest.hexdigest(), each
