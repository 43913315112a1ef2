"""Local reconstruction: train the kept weights of one window of a pruned model towards the dense model's outputs.

A window is any module with a callable that runs it on one sample (a decoder block, or its attention or MLP child). Its
inputs come from the pruned-so-far model, its targets from the dense model, so each window also makes up for the errors
of those before it. The loss is the squared error of the window's output; pruned entries stay exactly zero: their
gradient is masked, they start at zero and the optimizer has no weight decay.

The step of AdamW is proportional to the root mean square of each parameter's kept entries, so one setting serves
models of any scale. Some samples are held out; the state with the least held-out error is restored at the end, the
starting state included, so a window never leaves worse than it came.

Local reconstruction after pruning: Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
2023, and "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor, int], Tensor]
SMALLEST_SCALE = 1e-3  # a bias of zeros still learns: its steps are those of a parameter of this size


@dataclass(frozen=True)
class ReconstructOptions:
    """Constants of the training.

    Attributes:
        epochs: passes over the training samples.
        batch: samples per step, run one after the other. One window of text per step did best from 8 to 128 windows.
        rate: AdamW step relative to a parameter's root mean square; 10 % linear warm-up, then cosine to zero.
        holdout: share of the samples that only judge (at least one).
        seed: of the split and of the order of the samples.
        train_all: also train norms and biases (parameters of one dimension without a mask); no gain was seen.
    """

    epochs: int = 4
    batch: int = 1
    rate: float = 0.02
    holdout: float = 0.1
    seed: int = 0
    train_all: bool = False

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1 or not self.rate > 0 or not 0 < self.holdout < 1:
            raise ValueError(
                f"epochs and batch must be at least 1, rate above 0 and holdout in (0, 1), got {self.epochs}, "
                f"{self.batch}, {self.rate} and {self.holdout}"
            )


@dataclass(frozen=True)
class Reconstruction:
    """Held-out mean squared error before and after (equal when no state was better), and the optimizer steps made."""

    before: float
    after: float
    steps: int


def reconstruct(
    window: nn.Module,
    forward: Forward,
    masks: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    options: ReconstructOptions | None = None,
) -> Reconstruction:
    """Train `window` in place so that forward(inputs[i], i) comes close to targets[i].

    Args:
        window: its floating-point parameters are trained; float32 is expected (cast back is the caller's).
        forward: (input, sample number) -> output, differentiable through the parameters of `window`.
        masks: parameter name in `window` -> bool tensor of the PARAMETER's shape, True = kept.
        inputs: any indexable of tensors (they may be read from disk on access).
        targets: tensors of the shape of the outputs, as many as inputs. At least 2.

    Raises:
        ValueError: fewer than two samples, an unknown name or a mask of another shape, non-finite loss at the start.
    """
    options = options or ReconstructOptions()
    if len(inputs) != len(targets) or len(inputs) < 2:
        raise ValueError(f"reconstruction needs at least 2 pairs, got {len(inputs)} inputs and {len(targets)} targets")
    parameters = _trainable(window, masks, options)
    training, judging = _split(len(inputs), options)
    states = [parameter.requires_grad for parameter in window.parameters()]
    for parameter in window.parameters():
        parameter.requires_grad_(False)
    for parameter, _ in parameters:
        parameter.requires_grad_(True)
    try:
        return _train(forward, parameters, inputs, targets, training, judging, options)
    finally:
        for parameter, state in zip(window.parameters(), states, strict=True):
            parameter.requires_grad_(state)
            parameter.grad = None


def _train(
    forward: Forward,
    parameters: list[tuple[nn.Parameter, Tensor | None]],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    training: list[int],
    judging: list[int],
    options: ReconstructOptions,
) -> Reconstruction:
    before = best = _judge(forward, inputs, targets, judging)
    if not math.isfinite(before):
        raise ValueError(f"the window's held-out error is {before} before any training")
    kept = [parameter.detach().clone() for parameter, _ in parameters]
    optimizer = _optimizer(parameters, options)
    total = options.epochs * -(-len(training) // options.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, total))
    steps = 0
    for epoch in range(options.epochs):
        for batch in _batches(training, options, epoch):
            optimizer.zero_grad(set_to_none=True)
            for sample in batch:
                error = forward(inputs[sample], sample) - targets[sample]
                (error.square().mean() / len(batch)).backward()
            for parameter, mask in parameters:
                if mask is not None and parameter.grad is not None:
                    parameter.grad.masked_fill_(~mask, 0.0)
            optimizer.step()
            schedule.step()
            steps += 1
        error_now = _judge(forward, inputs, targets, judging)
        if error_now < best:  # False for NaN: a diverged epoch is never kept
            best = error_now
            for store, (parameter, _) in zip(kept, parameters, strict=True):
                store.copy_(parameter.detach())
    with torch.no_grad():
        for store, (parameter, mask) in zip(kept, parameters, strict=True):
            parameter.copy_(store if mask is None else store.masked_fill_(~mask, 0.0))
    return Reconstruction(before, best, steps)


def _trainable(
    window: nn.Module, masks: Mapping[str, Tensor], options: ReconstructOptions
) -> list[tuple[nn.Parameter, Tensor | None]]:
    named = dict(window.named_parameters())
    for name, mask in masks.items():
        if name not in named:
            raise ValueError(f"the window has no parameter {name!r}; it has {', '.join(sorted(named))}")
        if mask.shape != named[name].shape:
            raise ValueError(f"the mask of {name!r} is {list(mask.shape)}, the parameter {list(named[name].shape)}")
    return [
        (parameter, masks.get(name))
        for name, parameter in named.items()
        if parameter.is_floating_point() and (name in masks or (options.train_all and parameter.dim() < 2))
    ]


def _split(samples: int, options: ReconstructOptions) -> tuple[list[int], list[int]]:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(options.seed)).tolist()
    held = min(samples - 1, max(1, round(options.holdout * samples)))
    return sorted(order[held:]), sorted(order[:held])


def _batches(training: list[int], options: ReconstructOptions, epoch: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch + 1)
    order = torch.randperm(len(training), generator=generator).tolist()
    for first in range(0, len(order), options.batch):
        yield [training[i] for i in order[first : first + options.batch]]


def _optimizer(parameters: list[tuple[nn.Parameter, Tensor | None]], options: ReconstructOptions) -> torch.optim.AdamW:
    groups = []
    for parameter, mask in parameters:
        values = parameter.detach() if mask is None else parameter.detach()[mask]
        scale = float(values.float().square().mean().sqrt()) if values.numel() else 0.0
        groups.append({"params": [parameter], "lr": options.rate * max(scale, SMALLEST_SCALE)})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def _factor(step: int, total: int) -> float:
    """Linear warm-up over the first tenth, then cosine to zero."""
    return min(1.0, (step + 1) / max(1.0, 0.1 * total)) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))


@torch.no_grad()
def _judge(forward: Forward, inputs: Sequence[Tensor], targets: Sequence[Tensor], samples: list[int]) -> float:
    total, count = 0.0, 0
    for sample in samples:
        error = forward(inputs[sample], sample) - targets[sample]
        total += float(error.square().sum(dtype=torch.float64))
        count += error.numel()
    return total / max(count, 1)
