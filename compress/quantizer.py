"""The sparse format as transformers sees it: a quantisation method called "gossamer".

`import gossamer` registers both classes (gossamer/_hook.py); then `from_pretrained(FOLDER, variant="sparse")` reads the
packed matrices of docs/format.md. Before a weight is loaded, headers, records and masks of all files are checked and
every parameter must have its tensors: nothing is ever initialised at random. Matrices stay packed where a module can
run them so (placement.py), the others are expanded one parameter at a time, and the model keeps its masks
(`model.gossamer_masks`).

Imported in the middle of transformers' own import: only its base classes are imported here, the rest in functions.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .format import Scales, SourceMask
    from .keymap import KeyMap
    from .placement import Placement
    from .source import FolderSource, StoredSource

METHOD = "gossamer"
FORMAT_VERSION = 2


class GossamerConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: `format_version`, `modules` (packed matrices), `masks_sha256` (all masks).

    The last two may be None (not compared). Fields of later writers are kept. CheckpointError for a later format.
    """

    quant_method: Any = METHOD

    def __init__(
        self,
        format_version: int = 1,
        modules: int | None = None,
        masks_sha256: str | None = None,
        **others: Any,
    ) -> None:
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: format version {format_version!r}, this Gossamer reads up to {FORMAT_VERSION}",
                hint="install a newer Gossamer",
            )
        self.__dict__.update(others)
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = modules
        self.masks_sha256 = masks_sha256


class GossamerHfQuantizer(HfQuantizer):
    """Loads packed matrices into the model's own modules and packs them again when the model is saved."""

    requires_calibration = True  # a dense model becomes sparse by `gossamer compress`, not by loading it

    def __init__(self, quantization_config: GossamerConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: GossamerConfig = quantization_config
        self._keys: KeyMap | None = None
        self._masks: dict[str, SourceMask] = {}
        self._scales: dict[str, Scales] = {}
        self._form = "dense"
        self._folder: Path | None = None
        self._placement: Placement | None = None
        self.outgoing: tuple[dict[str, torch.Tensor], dict[str, str]] | None = None

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        dtype: Any = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Check everything that can be checked without loading. transformers calls this with the meta device set."""
        from .keymap import KeyMap
        from .placement import Placement
        from .unpack import check_conversions

        paths = [Path(file) for file in checkpoint_files or []]
        if not paths or any(path.suffix != ".safetensors" for path in paths):
            return model
        with torch.device("cpu"):
            source, self._form = _open(paths)
            self._folder = source.folder
            self._keys = KeyMap(model, source, dtype or torch.float32, torch.device("cpu"))
            check_complete(model, self._keys, source.folder)
            check_conversions(self._keys, model)
            if self._form == "sparse":
                self._check_config(source)
            self._masks, self._scales = source_masks(source), source_scales(source)
            self._placement = Placement(model, device_map)
        return model

    def _check_config(self, source: FolderSource) -> None:
        from .format import summarise

        found, said = summarise(source.records()), self.quantization_config
        if said.modules not in (None, found.matrices) or said.masks_sha256 not in (None, found.masks_sha256):
            raise CheckpointError(
                f"{source.folder}: config.json speaks of {said.modules} packed matrices and other masks than the "
                f"{found.matrices} that the weights have",
                hint="config.json and weights belong to different checkpoints",
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's converters, able to collect packed matrices."""
        if self._keys is None or self._form == "dense":
            return weight_conversions
        from .unpack import check_names, packed_conversions

        conversions = packed_conversions(weight_conversions, self._keys, self._masks, self._scales, self._placement)
        check_names(copy.deepcopy(conversions), self._keys, self._masks, model, self._scales)
        return conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Attach the masks. A model from dense weights is an ordinary one from here on."""
        if self._keys is not None:
            from .saving import attach

            with torch.device("cpu"):
                if self._placement is not None:
                    self._placement.finish(model)
                attach(model, self._keys, self._masks, self._form, self._scales, self._placement)
            self._masks, self._scales = {}, {}
        if self._folder is not None and self._form == "sparse":
            from .attachments import apply_attachments

            apply_attachments(model, self._folder)
        if self._form == "dense":
            self.remove_quantization_config(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        """What `save_pretrained` prepared; without it (the method of the class was called) plain dense weights."""
        return (None, {}) if self.outgoing is None else (self.outgoing[0], dict(self.outgoing[1]))

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Ordinary layers with dense weights; from now on the model is saved as an ordinary one."""
        from .runtime import expand_modules
        from .saving import detach

        expand_modules(model)
        detach(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def source_masks(source: StoredSource) -> dict[str, SourceMask]:
    """Every mask of a checkpoint by key, checked against its record (bits, count, sha256)."""
    found = {key: mask for key in source.records() if (mask := source.mask(key)) is not None}
    return {key: replace(mask, record=mask.record.with_floats()) for key, mask in found.items()}


def source_scales(source: FolderSource) -> dict[str, Scales]:
    """The scales of every matrix with int8 values, checked: a hundredth of the weights' size, and kept for saving."""
    from .format import Scales

    return {
        key: Scales(scales, record.int8)
        for key, record in source.records().items()
        if record.int8 is not None and (scales := source.scales(key)) is not None
    }


def check_complete(model: Any, keys: KeyMap, where: Path) -> None:
    """CheckpointError naming the first parameter that neither the checkpoint nor a tied one fills."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    missing = [name for name in keys.missing() if not _tied_to_loaded(name, tied, keys)]
    if missing:
        raise CheckpointError(
            f"{where} has no tensor for {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            hint="the checkpoint is incomplete: copy or write it again",
        )


def _tied_to_loaded(name: str, tied: dict[str, str], keys: KeyMap) -> bool:
    root = tied.get(name, name)
    family = {root, *(other for other, first in tied.items() if first == root)}
    return any(member in keys.groups for member in family)


def _open(paths: list[Path]) -> tuple[FolderSource, str]:
    """The files that transformers chose, and whether they are "sparse" or "dense"; masks beside dense ones are read."""
    from .modelfolder import MASKS, WeightFiles
    from .source import FolderSource

    folder = paths[0].parent
    source = FolderSource(folder, WeightFiles(tuple(paths)))
    if source.records() or any(path.name.startswith("model.sparse") for path in paths):
        return source, "sparse"
    masks = folder / MASKS
    return FolderSource(folder, WeightFiles(tuple(paths), masks=masks)) if masks.is_file() else source, "dense"
