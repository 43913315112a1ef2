"""Another adapter in place of one that is in use: as many writes as entries, no module is touched."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...errors import CheckpointError
from .layer import Linear, layers_of, named_layers
from .layout import COLUMNS, COUNTS, VALUES, decode
from .model import PREFIX

Delta = tuple[Tensor, Tensor, Tensor]  # values, rowptr, columns


def swap_adapter(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default") -> None:
    """Puts the tensors of an adapter's file into a model that has an adapter of that name on the same layers.

    A merged adapter is taken out of the weights, bit for bit, and the new one is merged in its place.

    Args:
        tensors: as `peft.load_peft_weights(folder)` reads them.

    Raises:
        CheckpointError: the file is of another model or of other layers.
        ModelError: it cannot be merged where the other one was. Whatever is raised, nothing has changed.
    """
    found = []
    for name, layer in named_layers(model, adapter_name):
        stem = name.removeprefix(PREFIX)
        keys = {key: f"{prefix}{stem}.{key}" for key in (VALUES, COLUMNS, COUNTS) for prefix in (PREFIX, "")
                if f"{prefix}{stem}.{key}" in tensors}  # fmt: skip
        stored = {key: tensors[full] for key, full in keys.items()}
        found.append((layer, decode(stored, layer.out_features, layer.in_features, stem)))
    wanted = {f"{layer.name}.{VALUES}" for layer in layers_of(model, adapter_name)}
    strange = {key.removeprefix(PREFIX) for key in tensors if key.endswith(VALUES)} - wanted
    if strange or not found:
        raise CheckpointError(
            f"the file has entries for {sorted(strange)[0].rpartition('.')[0] if strange else 'no layer here'}, "
            f"which adapter {adapter_name!r} of this model does not adapt",
            hint="swap adapters of the same target modules",
        )
    before = []
    try:
        for layer, new in found:
            before.append((layer, list(layer.merged_adapters), _delta(layer, adapter_name)))
            _put(layer, adapter_name, new, before[-1][1])
    except Exception:
        for layer, merged, old in before:
            _put(layer, adapter_name, old, merged)
        raise
    for layer, _ in found:
        layer.waiting.discard(adapter_name)


def _delta(layer: Linear, name: str) -> Delta:
    return (
        layer.spiel_values[name].detach().clone(),
        layer.spiel_rowptr[name].clone(),
        layer.spiel_columns[name].clone(),
    )


def _put(layer: Linear, name: str, delta: Delta, merged: list[str]) -> None:
    """The delta in place of the adapter's own; `merged`: the adapters that lie in the weight, before and after."""
    if layer.merged and name in merged:
        layer.unmerge()
    layer.set_csr(name, *delta)
    if name in merged:
        layer.merge(adapter_names=merged)
