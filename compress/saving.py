"""`save_pretrained` of a model with masks: what was read sparse is written sparse, under the names of the variant.

The method is replaced on the model itself, because transformers' own would write packed tensors to `model.safetensors`,
where a program without Gossamer would take them for unknown ones and start from random weights. Everything but the
weights (configuration, generation settings, own code, sharding, uploads) is still written by transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..errors import RecipeError
from ..kernels.bitmask.dispatch import compress
from ..kernels.modules.state import lazy_weights
from ..kernels.modules.weight import PackedWeight, ordinary
from .attached import Attached, ModelMasks, Outgoing, outgoing
from .attachments import entries, note, save_attachments
from .format import (
    BITMASK,
    METADATA_KEY,
    MatrixRecord,
    PackedTensor,
    Scales,
    SourceMask,
    dense_config,
    metadata,
    summarise,
)
from .keymap import KeyMap
from .modelfolder import DENSE, DENSE_INDEX, MASKS, SPARSE, SPARSE_INDEX
from .packing import as_int8
from .parametermasks import parameter_masks
from .placement import Placement
from .writer import Output, output, write_file

VARIANT = "sparse"
_NAMES = {"sparse": (SPARSE, SPARSE_INDEX), "dense": (DENSE, DENSE_INDEX)}


def attach(
    model: Any,
    keys: KeyMap,
    masks: Mapping[str, SourceMask],
    form: str,
    scales: Mapping[str, Scales] | None = None,
    placement: Placement | None = None,
) -> None:
    """Give `model` its masks (by checkpoint key) as `gossamer_masks` and a `save_pretrained` that keeps them.

    `form`: "sparse" or "dense", what the checkpoint was and what saving writes. `scales`: of its int8 values, by key.
    Masks of matrices that `placement` put into modules are read from there.
    """
    packed = {} if placement is None else placement.packed_masks(model)
    model.gossamer_masks = ModelMasks(parameter_masks(model, keys, masks, without=packed), packed)
    model._weight_conversions = list(keys.used)
    patterns = {key: mask.pattern for key, mask in masks.items()}
    model._gossamer = Attached(keys, form, patterns, scales or {})
    if form == "sparse" or masks:
        model.save_pretrained = MethodType(save_pretrained, model)


def detach(model: Any) -> None:
    """Back to an ordinary model: no masks, transformers' own `save_pretrained`, no word of ours in the config but for a
    head plan that it runs by."""
    plan = entries(model.config).get("heads") if "heads" in model.__dict__.get("gossamer_attached", ()) else None
    for name in ("gossamer_masks", "_gossamer", "save_pretrained"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, METADATA_KEY):
        delattr(model.config, METADATA_KEY)
    if plan is not None:
        note(model, "heads", plan)


def save_pretrained(
    self: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    **kwargs: Any,
) -> None:
    """transformers' `save_pretrained` with the same arguments, for a model that `attach` was called on.

    A model from sparse weights writes `model.sparse.safetensors` (or shards) without being asked for the variant; one
    from dense weights writes plain ones and `gossamer/masks.safetensors`. A matrix whose pruned entries are not zero
    any more is stored as it is, dense and without mask, and a warning says so. A matrix that had int8 values has the
    same ones again as long as its weights are those that they stand for, else floats, with a warning. RecipeError for
    another variant, a distributed checkpoint, or a folder that holds weights in the other form.
    """
    plain = type(self).save_pretrained
    arguments = {"is_main_process": is_main_process, "push_to_hub": push_to_hub, "max_shard_size": max_shard_size}
    if getattr(self, "_hf_peft_config_loaded", False):  # transformers saves the adapter alone
        plain(self, save_directory, state_dict=state_dict, variant=variant, **arguments, **kwargs)
        return
    form = self._gossamer.form
    folder = Path(save_directory)
    _check(folder, form, variant, kwargs)
    tensors, records, bits = _prepared(self, form, state_dict)
    _tell_config(self, form, records)
    if is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_attachments(self, folder)
    arguments |= {"save_original_format": False, **kwargs}
    single, index = (folder / name for name in _NAMES[form])
    before = _stamp(single)
    if form == "dense":
        plain(self, save_directory, state_dict=tensors, variant=variant, **arguments)
    else:
        self.hf_quantizer.outgoing = (tensors, metadata(records))
        try:
            plain(self, save_directory, variant=VARIANT, **arguments)
        finally:
            self.hf_quantizer.outgoing = None
    if is_main_process:
        (single if _stamp(single) == before else index).unlink(missing_ok=True)
        _save_masks(folder, bits, records)


def _check(folder: Path, form: str, variant: str | None, options: Mapping[str, Any]) -> None:
    if options.get("distributed_checkpoint"):
        raise RecipeError("a model with masks is not saved as a distributed checkpoint", hint="save it without")
    if form == "sparse" and variant not in (None, VARIANT):
        raise RecipeError(
            f"variant {variant!r}: sparse weights are saved as the variant {VARIANT!r} alone",
            hint="leave variant out, or call model.dequantize() first to save dense weights",
        )
    others = _NAMES["dense" if form == "sparse" else "sparse"]
    present = [name for name in others if (folder / name).is_file()]
    if present:
        raise RecipeError(
            f"{folder} holds other weights ({present[0]}), which would lie beside the {form} ones that are saved",
            hint="save to another folder",
        )


def _prepared(
    model: Any, form: str, state_dict: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, MatrixRecord], list[Output]]:
    """Tensors by stored name, records by key, and masks that go to a file of their own."""
    with lazy_weights():
        state = dict(state_dict or model.state_dict())
    unread = {name for name, tensor in state.items() if isinstance(tensor, PackedWeight)}
    plain = {name: tensor for name, tensor in state.items() if name not in unread}
    plain = remove_tied_weights_from_state_dict(plain, model)
    state = {name: state[name] if name in unread else plain[name] for name in state if name in unread or name in plain}
    state = {name: _present(model, name, tensor) for name, tensor in state.items()}
    tensors: dict[str, Tensor] = {}
    records: dict[str, MatrixRecord] = {}
    bits: list[Output] = []
    filled: list[str] = []
    changed: list[str] = []
    for item in outgoing(model._gossamer, model.gossamer_masks, state):
        packed = _packed(item)
        if item.mask is not None and packed is None:
            filled.append(item.key)
        if packed is None or form == "dense":
            tensors[item.key] = ordinary(item.tensor)
        if packed is not None and form == "sparse" and item.key in model._gossamer.scales:
            again = as_int8(packed, ordinary(item.tensor), model._gossamer.scales[item.key])
            changed += [item.key] if again is None else []
            packed = again or packed
        if packed is not None:
            records[item.key] = packed.record
            if form == "dense":
                bits.append(output(item.key + BITMASK, packed.bits))
            else:
                tensors |= packed.tensors(item.key)
    if filled:
        _warn_filled(filled, len(filled) + len(records))
    if changed:
        _warn_changed(changed, len(records))
    return tensors, records, bits


def _present(model: Any, name: str, tensor: Any) -> Any:
    """The tensor itself, read back if it was offloaded to disk."""
    if isinstance(tensor, Tensor) and tensor.device.type == "meta":
        return load_offloaded_parameter(model, name)
    return tensor.detach() if isinstance(tensor, Tensor) else tensor


def _packed(item: Outgoing) -> PackedTensor | None:
    """None without a mask, and when something other than zero stands where the mask prunes."""
    if item.mask is None:
        return None
    record = item.mask.record
    rows = record.as_rows(ordinary(item.tensor).cpu())
    values = compress(rows, item.mask.bits)
    if int(torch.count_nonzero(rows)) != int(torch.count_nonzero(values)):
        return None
    return PackedTensor(item.mask.bits, values, record)


def _warn_filled(keys: list[str], count: int) -> None:
    warnings.warn(
        f"{len(keys)} of {count} pruned matrices have weights other than zero where their masks prune "
        f"({keys[0]}{', ...' if keys[1:] else ''}): they are saved dense, as they are, and without their masks. "
        "Multiply by model.gossamer_masks[name].to_bool() while training to keep zeros",
        stacklevel=4,
    )


def _warn_changed(keys: list[str], count: int) -> None:
    warnings.warn(
        f"{len(keys)} of {count} pruned matrices had int8 values and other weights now ({keys[0]}"
        f"{', ...' if keys[1:] else ''}): they are saved with float values, exactly. "
        "gossamer convert IN OUT --to sparse --values int8 rounds them again",
        stacklevel=4,
    )


def _tell_config(model: Any, form: str, records: dict[str, MatrixRecord]) -> None:
    """config.json is written by transformers from these attributes."""
    summary = summarise(records)
    before = getattr(model.config, METADATA_KEY, None)
    own = dense_config({METADATA_KEY: before}, summary).get(METADATA_KEY)
    setattr(model.config, METADATA_KEY, own or {"format_version": summary.version})
    if form == "sparse":
        said = model.hf_quantizer.quantization_config
        said.format_version = summary.version
        said.modules, said.masks_sha256 = summary.matrices, summary.masks_sha256
        model.config.quantization_config = said


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells whether a file was written: transformers leaves an old single file beside new shards, an old index beside a
    new single file."""
    if not path.is_file():
        return None
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def _save_masks(folder: Path, bits: list[Output], records: dict[str, MatrixRecord]) -> None:
    if bits:
        write_file(folder / MASKS, bits, metadata(records))
    else:
        (folder / MASKS).unlink(missing_ok=True)
