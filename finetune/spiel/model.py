"""The tuner: puts sparse deltas into a model, gives each its share of the budget, saves and loads them through peft."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ... import __version__
from ...errors import CheckpointError
from ...pruning.mask import Mask
from ..budget import share_out, total
from ..quantised import keep_unpacked
from .base import UNCHECKED, fingerprints
from .config import SpielConfig
from .layer import Linear, SpielLayer, layers_of, named_layers
from .layout import COLUMNS, COUNTS, ROWPTR, VALUES, decode, encode
from .merge import renewed
from .positions import draw, generator
from .select import strongest_weights
from .targets import EVERY_LINEAR, check_targets, include_packed

PREFIX = "base_model.model."


class SpielModel(BaseTuner):
    """Sparse deltas on every layer that the configuration names. Masks are taken from `model.gossamer_masks`."""

    prefix = "spiel_"
    tuner_layer_cls = SpielLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As peft does it; then the budget is shared out, unless the positions come from a file.

        The model keeps a copy of the configuration, as saving writes into it: the caller's can be used again.
        """
        config: SpielConfig = copy.copy(self.peft_config[adapter_name])  # type: ignore[assignment]
        self.peft_config[adapter_name] = config
        self._prepare_adapter_config(config, {})
        keep_unpacked(model)  # bitsandbytes repacks 4-bit weights on CPUs, and has no gradient beside what is repacked
        check_targets(config, model)
        include_packed(config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not config.is_loaded:
            place_entries(layers_of(model, adapter_name), adapter_name, config)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None:  # type: ignore[attr-defined]
            peft_config.target_modules = EVERY_LINEAR  # type: ignore[attr-defined]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SpielConfig)
        if isinstance(target, Linear):
            target.update_layer(adapter_name, peft_config)
            return
        made = Linear(target, current_key, self._mask(current_key, target), **get_quantization_kwargs(self))
        made._active_adapter = adapter_name
        made.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    def _mask(self, name: str, layer: nn.Module) -> Mask | None:
        """The mask of a layer's weight as rows [out, in], from whatever object the model carries."""
        found = (getattr(self.model, "gossamer_masks", None) or {}).get(f"{name}.weight")
        if found is None:
            return None
        return Mask(found.bits, _inputs(layer), found.pattern)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As peft does it; what cannot be merged is found before the first layer is changed."""
        self._check_merges(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_merges(self, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, Linear):
                with onload_layer(layer):
                    layer.check_merge(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """As peft does it, with all layers checked before the first is changed.

        What merging reports per layer is left on the model: `spiel_reports`, and where a merge pruned again, the masks
        that hold from then on: `spiel_masks` (parameter name -> Mask); they take their place in `gossamer_masks` too.
        """
        if merge:
            self._check_merges(adapter_names)
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, Linear)}
        merged: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # type: ignore[func-returns-value]
        merged.spiel_reports = {name: dict(layer.reports) for name, layer in layers.items() if layer.reports}
        masks = {f"{name}.weight": layer.merged_mask for name, layer in layers.items() if layer.merged_mask is not None}
        merged.spiel_masks = masks
        held = getattr(merged, "gossamer_masks", None) or {}
        for name in masks.keys() & held.keys():
            held[name] = renewed(held[name], masks[name])
        lost = sum(r.lost for reports in merged.spiel_reports.values() for r in reports.values())
        entries = sum(r.entries for reports in merged.spiel_reports.values() for r in reports.values())
        if lost > entries / 2:
            warnings.warn(
                f"{lost} of {entries} entries are lost in merging: they are below the rounding of the base weights. "
                "Merge into a float32 model, or keep the adapter beside it.",
                stacklevel=3,
            )
        return merged

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The tensors of the file, see `layout`; writes into the configuration what a reader checks."""
        assert isinstance(config, SpielConfig)
        taken = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        dtype = getattr(torch, config.file_dtype)
        for name, layer in named_layers(model, adapter_name):
            keys = {key: f"{name}.{key}.{adapter_name}" for key in (VALUES, COLUMNS, ROWPTR)}
            values, columns, rowptr = (taken.pop(keys[key]) for key in (VALUES, COLUMNS, ROWPTR))
            stored = encode(values, rowptr, columns, layer.in_features, dtype)
            taken |= {f"{name}.{key}.{adapter_name}": tensor for key, tensor in stored.items()}
        layers = layers_of(model, adapter_name)
        if not any(layer.merged for layer in layers):
            config.base_fingerprint, config.layer_fingerprints = fingerprints_of(layers)
        config.gossamer_version = __version__
        return taken

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Tensors of a file -> tensors of the model; every layer is made as large as the file says.

        Raises:
            CheckpointError: the file is damaged, or belongs to another base.
        """
        assert isinstance(config, SpielConfig)
        state_dict = dict(state_dict)
        _check_base(config, layers_of(model, adapter_name))
        made: dict[str, Tensor] = {}
        for name, layer in named_layers(model, adapter_name):
            short = name.removeprefix(PREFIX)
            stored = {}
            for key in (VALUES, COLUMNS, COUNTS):
                for stem in (short, PREFIX + short):
                    if f"{stem}.{key}" in state_dict:
                        stored[key] = state_dict.pop(f"{stem}.{key}")
            layer.waiting.discard(adapter_name)
            values, rowptr, columns = decode(stored, layer.out_features, layer.in_features, short)
            if len(values) != len(layer.spiel_values[adapter_name]):
                old = layer.spiel_values[adapter_name]
                layer.spiel_values[adapter_name] = nn.Parameter(
                    torch.empty_like(values, device=old.device), requires_grad=old.requires_grad
                )
                layer.spiel_columns[adapter_name] = torch.empty_like(columns, device=old.device)
            for key, tensor in ((VALUES, values), (COLUMNS, columns), (ROWPTR, rowptr)):
                made[f"{name}.{key}.{adapter_name}"] = tensor
        strange = [key for key in state_dict if f".{cls.prefix}" in key]
        if strange:
            raise CheckpointError(
                f"the adapter has entries for {strange[0].rpartition('.')[0].removeprefix(PREFIX)}, "
                "which is no adapted layer of this model",
                hint="it was made for another model",
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict) | made


def place_entries(layers: list[Linear], adapter_name: str, config: SpielConfig) -> None:
    """Shares the budget out and chooses the positions to begin with; every value is 0."""
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    count = total(shapes, config.density, config.num_weights, config.rank_equivalent)
    shares = share_out(count, shapes, [layer.room(adapter_name) for layer in layers], config.allocation)
    if config.selection == "magnitude":
        chosen = strongest_weights(layers, adapter_name, shares, config.allocation)
    else:
        chosen = [
            draw(k, *shape, generator(config.seed, layer.name), layer.allowed(adapter_name))
            for k, shape, layer in zip(shares, shapes, layers, strict=True)
        ]
    for layer, flat in zip(layers, chosen, strict=True):
        layer.set_delta(adapter_name, flat, torch.zeros(len(flat)))


def fingerprints_of(layers: list[Linear]) -> tuple[str, dict[str, str]]:
    """Digests of the weights below these layers, as `base.fingerprints`."""
    return fingerprints((layer.name, layer.get_base_layer(), layer.base) for layer in layers)


def _check_base(config: SpielConfig, layers: list[Linear]) -> None:
    """CheckpointError for other weights than those of training, layer by layer where the file says so much."""
    known, parts = config.base_fingerprint, config.layer_fingerprints or {}
    checkable = bool(parts) or known not in (None, UNCHECKED)
    if not config.check_base or not checkable or any(layer.merged for layer in layers):
        return
    found, each = fingerprints_of(layers)
    if parts:
        known, found = next(((parts[n], each[n]) for n in each if parts.get(n, each[n]) != each[n]), ("", ""))
    if found not in (known, UNCHECKED):
        raise CheckpointError(
            f"the adapter was trained on other weights: fingerprint {str(known)[:12]}, this model has {found[:12]}",
            hint="take the model named in adapter_config.json, or say that it does not matter: --any-base of "
            "gossamer adapter merge, a config with check_base=False in Python",
        )


def _inputs(layer: Any) -> int:
    """Inputs of a linear layer, below whatever wraps it; Conv1D has no `in_features`."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])
