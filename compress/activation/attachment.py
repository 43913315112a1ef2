"""The activation policy of a checkpoint as something that travels with it: applied at load, written at save."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from ..format import METADATA_KEY
from ..runtime import Placed
from .file import FILE, NAME, read_policy, write_policy
from .loaded import apply_policy


class ActivationAttachment:
    """What compress/attachments.py calls an attachment."""

    def apply(self, model: Any, folder: Path, entry: dict[str, Any]) -> None:
        """Make the model skip at decode what the policy says. CheckpointError for a file that does not fit."""
        policy = read_policy(folder, entry)
        placed: Placed | None = getattr(model, "gossamer_runtime", None)
        options = None if placed is None else placed.options
        if options is None:
            apply_policy(model, policy)
        else:
            apply_policy(model, policy, kernels=options.packed, prefill=options.prefill)
        reference(model, options is not None and options.backend == "reference")
        if "save_pretrained" not in model.__dict__:  # no masks: transformers' own method, which knows nothing of us
            model.save_pretrained = MethodType(save_pretrained, model)

    def save(self, model: Any, folder: Path) -> dict[str, Any]:
        """Write the policy that the model runs, whatever happened to its folder."""
        return write_policy(folder / FILE, model.gossamer_activation.policy)


def reference(model: Any, wanted: bool) -> None:
    """Let the modules of the policy compute in plain torch, or not."""
    from ...kernels.modules.neuron_subset import NeuronSubsetMLP
    from ...kernels.modules.thresholds import ThresholdLinear

    for module in model.modules():
        if isinstance(module, ThresholdLinear | NeuronSubsetMLP):
            module.reference = wanted


def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained`, and the policy beside the weights."""
    from ..attachments import save_attachments

    if kwargs.get("is_main_process", True):
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        if not isinstance(getattr(self.config, METADATA_KEY, None), dict):
            setattr(self.config, METADATA_KEY, {"format_version": 1})
        save_attachments(self, Path(save_directory))
    type(self).save_pretrained(self, save_directory, *args, **kwargs)


__all__ = ["NAME", "ActivationAttachment", "save_pretrained"]
