"""The average of models that share masks: the masks compared by hash, then a streaming mean that loses no zero.

The average of differently pruned models is dense, so nothing is added up before the masks are known to be equal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingError
from .mask import Mask

# ---- equal masks ---------------------------------------------------------------------------------------------------


def masks_sha256(masks: Mapping[str, Mask]) -> str:
    """Digest over names, shapes and bits of all masks, in the order of the names."""
    whole = hashlib.sha256()
    for name in sorted(masks):
        rows, cols = masks[name].shape
        whole.update(f"{name} {rows}x{cols} {masks[name].sha256()}\n".encode())
    return whole.hexdigest()


def check_same_masks(candidates: Sequence[Mapping[str, Mask]], names: Sequence[str] | None = None) -> str:
    """The digest that all candidates share. `names`: what the candidates are called.

    Raises:
        CheckpointError: names the first matrix whose masks differ, and both candidates.
    """
    called = list(names or (f"candidate {number}" for number in range(1, len(candidates) + 1)))
    first = candidates[0]
    digests = {name: mask.sha256() for name, mask in first.items()}
    for candidate, masks in zip(called[1:], candidates[1:], strict=True):
        for name in sorted({*first, *masks}):
            if name not in first or name not in masks:
                without = candidate if name in first else called[0]
                problem = f"has no mask in {without}"
            elif first[name].shape != masks[name].shape:
                problem = f"is {first[name].shape} in {called[0]} and {masks[name].shape} in {candidate}"
            elif masks[name].sha256() != digests[name]:
                problem = f"is masked differently in {called[0]} and in {candidate}"
            else:
                continue
            raise CheckpointError(
                f"{name} {problem}: an average of different masks would not be sparse",
                hint="prune once and train every candidate from that one parent",
            )
    return masks_sha256(first)


# ---- the average ---------------------------------------------------------------------------------------------------


class Mean:
    """Weighted mean of state dicts, one at a time: the memory of the mean and of the one being added.

    mean += (x - mean) w / (w_1 + ... + w), in float32 (float64 stays): equal candidates average to themselves bit for
    bit, and zeros to zero. The result has the first candidate's dtypes. Whole numbers and flags cannot be averaged:
    they must be equal, but for BatchNorm's `num_batches_tracked`, of which the largest is kept; its running statistics
    are averaged and stale (`recalibrate`).
    """

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0.0

    def add(self, state: Mapping[str, Tensor], weight: float = 1.0, name: str = "the candidate") -> None:
        """Take one candidate in. Nothing of `state` is kept.

        Raises:
            CheckpointError: other tensors or shapes than the first candidate's, or whole numbers that differ.
            TrainingError: a value that is not finite.
        """
        if not 0 < weight < math.inf:
            raise ValueError(f"a weight must be finite and above 0, got {weight}")
        if not self._mean:
            self._dtypes = {key: tensor.dtype for key, tensor in state.items()}
        self._check_keys(state, name)
        self._total += weight
        share = weight / self._total
        for key, tensor in state.items():
            if not _averaged(tensor):
                self._whole(key, tensor, name)
                continue
            value = tensor.detach().to(_wide(tensor.dtype))
            if not bool(torch.isfinite(value).all()):
                raise TrainingError(f"{key} of {name} is not finite", hint="leave this candidate out")
            if key in self._mean:
                self._mean[key].add_((value - self._mean[key]).mul_(share))
            else:
                self._mean[key] = value.clone()

    def _check_keys(self, state: Mapping[str, Tensor], name: str) -> None:
        if self._dtypes.keys() != state.keys():
            odd = sorted(self._dtypes.keys() ^ state.keys())
            raise CheckpointError(
                f"{name} does not have the same tensors as the others: {odd[0]}"
                + (f" and {len(odd) - 1} more" if len(odd) > 1 else ""),
                hint="candidates must be copies of one parent",
            )
        for key, mean in self._mean.items():
            if mean.shape != state[key].shape:
                raise CheckpointError(
                    f"{key} is {list(state[key].shape)} in {name} and {list(mean.shape)} in the others",
                    hint="candidates must be copies of one parent",
                )

    def _whole(self, key: str, tensor: Tensor, name: str) -> None:
        known = self._mean.setdefault(key, tensor.detach().clone())
        if key.endswith("num_batches_tracked"):
            self._mean[key] = torch.maximum(known, tensor)
        elif not torch.equal(known, tensor):
            raise CheckpointError(
                f"{key} holds {str(tensor.dtype).removeprefix('torch.')} values that differ in {name}: "
                "they cannot be averaged",
                hint="candidates must be copies of one parent",
            )

    def result(self) -> dict[str, Tensor]:
        """The mean, in the candidates' own dtypes. ValueError when nothing was added."""
        if not self._total:
            raise ValueError("nothing was added")
        return {key: tensor.to(self._dtypes[key]) for key, tensor in self._mean.items()}


def average(load: Sequence[Callable[[], Mapping[str, Tensor]]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The mean of what the callables load, one at a time; a candidate of weight 0 is not loaded."""
    mean = Mean()
    for number, (state, weight) in enumerate(zip(load, weights, strict=True), 1):
        if weight:
            mean.add(state(), weight, f"candidate {number}")
    return mean.result()


def _averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def has_statistics(model: nn.Module) -> bool:
    """Whether an average leaves running statistics behind that fit none of the candidates (BatchNorm)."""
    return any(_tracks(module) for module in model.modules())


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Callable[[nn.Module], object]]) -> None:
    """Measure running statistics anew: the plain mean over `batches`, each of which runs the model on its data.

    LayerNorm and RMSNorm have none, so for most language models there is nothing to do.
    """
    tracking: list[Any] = [module for module in model.modules() if _tracks(module)]
    momenta, training = [module.momentum for module in tracking], model.training
    for module in tracking:
        module.reset_running_stats()
        module.momentum = None  # a cumulative average
    model.train()
    try:
        for batch in batches:
            batch(model)
    finally:
        model.train(training)
        for module, momentum in zip(tracking, momenta, strict=True):
            module.momentum = momentum


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
