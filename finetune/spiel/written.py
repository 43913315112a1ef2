"""What is written of a model with an adapter: the adapter's folder, and merged matrices of a quantised base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..quantised import is_quantised, origin_of, plain
from .base import writable_weight
from .layer import Linear
from .model import PREFIX

ADAPTER = "default"


def save_adapter(model: Any, folder: Path, base: str) -> list[str]:
    """Writes adapter_model.safetensors and adapter_config.json as peft reads them, the latter with the model's name,
    `base`; the names of both."""
    config: PeftConfig = model.peft_config[ADAPTER]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    named = {PREFIX + key.removeprefix(PREFIX): tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode, config.base_model_name_or_path = True, base
    config.save_pretrained(str(folder))
    return ["adapter_model.safetensors", "adapter_config.json"]


@torch.no_grad()
def merged(model: Any, names: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(parameter name, base plus delta in float32, new mask or None) of adapted layers, in the parameter's shape.

    A quantised base counts as the matrix that it stands for. Each layer is emptied when the next one is asked for: two
    float32 matrices exist at a time. What merging reports is left on the model, as by `SpielModel`.
    """
    model.spiel_reports, model.spiel_masks = {}, {}
    for name in names:
        layer: Any = model.get_submodule(name)
        base, mask = layer.get_base_layer(), None
        matrix: Tensor
        origin = origin_of(base)
        if isinstance(layer, Linear):
            layer.dequantise()
            layer.merge()
            matrix = writable_weight(layer.get_base_layer(), layer.base, name)
            model.spiel_reports[name] = dict(layer.reports)
            if layer.merged_mask is not None:
                model.spiel_masks[f"{name}.weight"] = layer.merged_mask
                mask = oriented(layer.merged_mask.to_bool(), matrix)
        else:
            matrix = plain(base).weight.data if is_quantised(base) else base.weight.data.float()
            matrix = matrix + layer.get_delta_weight(ADAPTER).float()
        if origin is not None and origin.transposed:
            matrix, mask = matrix.t(), None if mask is None else mask.t()
        yield f"{name}.weight", matrix, mask
        layer.base_layer = nn.Identity()


def oriented(rows: Tensor, like: Tensor) -> Tensor:
    """A mask in the [out, in] view, in the orientation of the parameter's own mask."""
    return (rows if rows.shape == like.shape else rows.t()).to(like.device)


def lost(model: Any) -> dict[str, Any]:
    """Share of the entries that merging lost to the rounding of the weights."""
    reports = [one for found in getattr(model, "spiel_reports", {}).values() for one in found.values()]
    entries = sum(one.entries for one in reports)
    return {"lost_in_merging": sum(one.lost for one in reports) / entries} if entries else {}
