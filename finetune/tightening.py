"""Gradual pruning inside the Trainer: after certain steps the masks shrink, and what they prune is zeroed at once.

The masks in force are written beside the trainer's checkpoints whenever they change, so that a resumed run has those of
its checkpoint: they depend on all weights since the beginning and cannot be computed again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ..errors import CheckpointError
from ..pruning.gradual import Cubic
from ..pruning.mask import Mask
from .masked import MaskGuard
from .resuming import newest_checkpoint

Tighten = Callable[[float], Mapping[str, Tensor]]


class Tightening(TrainerCallback):
    """Follows a cubic curve.

    Args:
        curve: over optimizer steps.
        tighten: sparsity -> the new masks by parameter name, each inside the one before; every rank gets the same.
        restore: takes over masks that were read from disk.
        folder: of the trainer's checkpoints. `writes`: whether this process writes there.
    """

    def __init__(
        self,
        curve: Cubic,
        tighten: Tighten,
        restore: Callable[[dict[str, Tensor]], None],
        folder: Path,
        *,
        writes: bool,
    ) -> None:
        self.curve, self.folder, self.writes = curve, folder, writes
        self._tighten, self._restore = tighten, restore
        self._guard: MaskGuard | None = None
        self._optimizer: Any = None

    def take_guard(self, guard: MaskGuard, optimizer: Any, step: int) -> None:
        """Called when training begins, at `step`. CheckpointError when the masks of a resumed run are lost."""
        self._guard, self._optimizer = guard, optimizer
        if step == 0:
            for path in self.folder.glob("masks-*.safetensors"):  # of a run that was given up
                path.unlink(missing_ok=True)
            return
        known = [number for number in _known(self.folder) if number <= step]
        if not known:
            if step >= self.curve.begin and self.curve.holds(step) > self.curve.initial:
                raise CheckpointError(
                    f"{self.folder} has no masks of step {step}", hint="start afresh with --overwrite"
                )
            return
        self._restore(self._read(max(known), guard))

    def _read(self, step: int, guard: MaskGuard) -> dict[str, Tensor]:
        path = _path(self.folder, step)
        try:
            bits = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}", hint="start afresh with --overwrite") from error
        shapes = {name: guard.shape(name) for name in guard}
        found = {name: Mask(bits[name], shape[-1], "").to_bool().reshape(shape) for name, shape in shapes.items()}
        for name, mask in found.items():
            guard.replace(name, mask)
        guard.apply(self._optimizer)
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Shrink the masks when the curve says so."""
        step = state.global_step
        if not self.curve.tightens(step) or self._guard is None:
            return
        with torch.no_grad():
            masks = self._tighten(self.curve.sparsity(step))
            for name, mask in masks.items():
                self._guard.replace(name, mask)
            self._guard.apply(self._optimizer)
        if self.writes:
            self._write(step, masks)

    def _write(self, step: int, masks: Mapping[str, Tensor]) -> None:
        path = _path(self.folder, step)
        packed = {name: Mask.from_bool(mask.reshape(-1, mask.shape[-1]).cpu(), "").bits for name, mask in masks.items()}
        unfinished = path.with_suffix(".unfinished")
        save_file(packed, unfinished)
        unfinished.replace(path)
        newest = newest_checkpoint(self.folder)
        saved = 0 if newest is None else int(newest.name.rpartition("-")[2])
        before = [number for number in _known(self.folder) if number <= saved]
        for number in before[:-1]:
            _path(self.folder, number).unlink(missing_ok=True)


def _path(folder: Path, step: int) -> Path:
    return folder / f"masks-{step:08d}.safetensors"


def _known(folder: Path) -> list[int]:
    found = [re.fullmatch(r"masks-(\d+)\.safetensors", path.name) for path in folder.glob("masks-*.safetensors")]
    return sorted(int(match[1]) for match in found if match)
