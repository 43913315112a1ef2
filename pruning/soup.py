"""Sparse model soups: candidates that share a parent and its masks, averaged without losing a zero.

Prune once, train m copies that differ in one factor, average them: the average has the parent's masks and is the next
phase's parent. Masks are compared by hash before anything is added up, since the average of differently pruned models
is dense.

Zimmer et al., "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging", ICLR 2024. Greedy and uniform
soups: Wortsman et al., "Model soups", ICML 2022; there a candidate is taken at an equal score, here only when the gain
exceeds the noise of the held-out text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError, TrainingError
from .mask import Mask

NOISE_MARGIN = 1.0


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
    tracking = [module for module in model.modules() if _tracks(module)]
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


# ---- which candidates ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Soup:
    """How much of each candidate goes in (`weights`, sum 1), and the held-out loss of each sequence, float64 [n]."""

    weights: tuple[float, ...]
    losses: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


def uniform_weights(members: Iterable[int], count: int) -> tuple[float, ...]:
    """1 / k for each of the k members, 0 for the other candidates."""
    chosen = set(members)
    return tuple(1 / len(chosen) if index in chosen else 0.0 for index in range(count))


def noise(difference: Tensor) -> float:
    """Standard error of the mean of paired per-sequence differences; infinite for fewer than two."""
    n = difference.numel()
    return float(difference.double().std(correction=1)) / math.sqrt(n) if n > 1 else math.inf


def better(new: Tensor, old: Tensor, margin: float) -> bool:
    """Whether the mean loss fell by more than `margin` standard errors of the paired differences."""
    gain = old.double() - new.double()
    if margin == 0:
        return float(gain.mean()) > 0
    return float(gain.mean()) > margin * noise(gain)


def greedy(
    candidates: Sequence[Tensor],
    evaluate: Callable[[tuple[float, ...]], Tensor],
    margin: float = NOISE_MARGIN,
) -> Soup:
    """Start from the best candidate; take each next best one in if the average gets better by more than the noise.

    Args:
        candidates: held-out losses per sequence, [n] each, of the same sequences.
        evaluate: the losses of the soup with these weights.
        margin: in standard errors of the paired differences; 0 takes every gain.
    """
    order = sorted(range(len(candidates)), key=lambda index: (float(candidates[index].double().mean()), index))
    members = order[:1]
    found = Soup(uniform_weights(members, len(candidates)), candidates[order[0]].double())
    for index in order[1:]:
        weights = uniform_weights([*members, index], len(candidates))
        losses = evaluate(weights).double()
        if better(losses, found.losses, margin):
            members.append(index)
            found = Soup(weights, losses)
    return found


def learn_weights(
    count: int,
    gradient: Callable[[tuple[float, ...]], tuple[float, Sequence[float]]],
    steps: int = 10,
    rate: float = 1.0,
) -> tuple[float, ...]:
    """Weights on the simplex by exponentiated gradient descent, from the uniform soup; the best that were seen.

    w_i <- w_i exp(-rate g_i / max |g|), normalised: the step does not depend on the scale of the gradient. With
    theta = sum w_i theta_i, g_i = <dL / d theta, theta_i>, so one candidate in memory at a time is enough.

    Args:
        count: number of candidates.
        gradient: weights -> (held-out loss, d loss / d w).
        steps: evaluations of `gradient`.
        rate: halved whenever the loss did not fall.
    """
    weights = uniform_weights(range(count), count)
    best, best_loss, best_slope = weights, math.inf, [0.0] * count
    for _ in range(steps):
        loss, slope = gradient(weights)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of a soup is {loss}", hint="use --soup uniform or greedy")
        if loss < best_loss:
            middle = sum(slope) / count  # a shift common to all cancels in the normalisation
            best, best_loss, best_slope = weights, loss, [value - middle for value in slope]
        else:
            rate /= 2
        scale = max(map(abs, best_slope)) or 1.0
        raw = [w * math.exp(-rate * g / scale) for w, g in zip(best, best_slope, strict=True)]
        weights = tuple(value / sum(raw) for value in raw)
    return best


def ensemble_losses(log_probabilities: Tensor) -> Tensor:
    """Loss of the prediction ensemble, the mean of the candidates' probabilities.

    log_probabilities: of the true token, [candidates, ...]. Returns -log(mean over candidates of p), [...].
    """
    count = log_probabilities.shape[0]
    return math.log(count) - torch.logsumexp(log_probabilities.double(), dim=0)


def check_count(candidates: int, ranks: int = 1) -> None:
    """RecipeError for fewer than two candidates, or for rank groups that would have none."""
    if candidates < 2:
        raise RecipeError(f"a soup needs at least 2 candidates, got {candidates}", hint="three to five are usual")
    if ranks > candidates:
        raise RecipeError(
            f"{ranks} processes were started for {candidates} candidates: each trains one at a time",
            hint=f"start at most {candidates} processes, or raise --candidates",
        )
