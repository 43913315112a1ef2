"""A model and its masks between two phases of training: what training changes, in the dtype it was trained in.

Unlike the parts of a stage this is no checkpoint: nothing is packed or rounded, and it never leaves the unfinished run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, ResumeError
from ..finetune.resuming import changing
from ..finetune.sharded import gathered
from ..pruning.mask import Mask
from ..pruning.mean import masks_sha256
from .writer import write_part

_STATE, _MASK, _MORE = "state:", "mask:", "more:"


def whole_tensors(model: Any) -> dict[str, Tensor]:
    """Everything that training may change, by name; sharded parameters are gathered, so every rank has to call it."""
    return {name: gathered(tensor) for name, tensor in changing(model).items()}


def is_sharded(model: Any) -> bool:
    """Whether parameters lie in pieces on several ranks (FSDP2)."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def packed_masks(masks: Mapping[str, Tensor]) -> dict[str, Mask]:
    """Parameter name -> its mask as rows of the parameter's last dimension."""
    return {name: Mask.from_bool(mask.reshape(-1, mask.shape[-1]).cpu(), "") for name, mask in masks.items()}


def write_state(
    path: Path, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], more: Mapping[str, Tensor] | None = None
) -> str:
    """Write all of it, durably and at once; the digest of the masks. `more`: tensors of the caller's own."""
    packed = packed_masks(masks)
    held = {_STATE + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    held |= {_MASK + name: mask.bits for name, mask in packed.items()}
    held |= {_MORE + name: tensor.detach().cpu().contiguous() for name, tensor in (more or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_part(path, held, {})
    return masks_sha256(packed)


class StateFile:
    """What `write_state` wrote. ResumeError when it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self._keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ResumeError(f"{path} cannot be read: {error}", hint="start afresh with --overwrite") from error

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of the model."""
        return self._read(_STATE)

    def more(self) -> dict[str, Tensor]:
        return self._read(_MORE)

    def masks(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks, in the shapes and on the devices of `like`."""
        bits = self._read(_MASK)
        if bits.keys() != like.keys():
            raise ResumeError(f"{self.path} holds masks of other matrices", hint="start afresh with --overwrite")
        return {
            name: Mask(bits[name], mask.shape[-1], "").to_bool().reshape(mask.shape).to(mask.device)
            for name, mask in like.items()
        }

    def masks_sha256(self, like: Mapping[str, Tensor]) -> str:
        bits = self._read(_MASK)
        return masks_sha256({name: Mask(bits[name], mask.shape[-1], "") for name, mask in like.items()})

    def _read(self, kind: str) -> dict[str, Tensor]:
        with safe_open(self.path, "pt") as file:
            return {key[len(kind) :]: file.get_tensor(key) for key in self._keys if key.startswith(kind)}


@torch.no_grad()
def load_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model, in place. CheckpointError when they are of another one."""
    own = changing(model)
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise CheckpointError("a saved state is of another model", hint="start afresh with --overwrite")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
