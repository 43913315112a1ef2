"""Progressive gradient flow for N:M on many matrices at once: attach, follow the steps, leave explicit masks.

The training loop belongs to the caller. Around it:

    flow = Flow(matrices, FlowOptions("mdgf-exp", steps=1000), model)
    flow.watch(optimizer)
    for step in range(1000):
        flow.at(step)
        ... forward, backward, optimizer.step() ...
    masks = flow.finish()

`flow_schedule.py` has the schedules, `flow_weight.py` the parametrization that carries mask and step in the model's
state dict: a model built the same way, given that state dict, continues exactly, in the middle of a frame too.

Lambda: before the optimizer moves a weight w at learning rate eta, what is outside the mask is pulled towards zero,

    decoupled     w -= eta lambda (1 - m) w      as AdamW's weight decay, untouched by its second moment
    in gradient   g += lambda (1 - m) w          as published for SGD (Zhou et al., ICLR 2021); once per step, not once
                                                 per micro-batch, and after clipping
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize

from ..errors import RecipeError
from .flow_schedule import KINDS, FlowSchedule
from .flow_weight import FlowWeight
from .mask import Mask
from .pattern import NM

SHRINK_IN_GRADIENT = 2e-4  # of sr-ste, as published


@dataclass(frozen=True)
class FlowMatrix:
    """One matrix to train towards `pattern`.

    Attributes:
        module, parameter: where it is: [out, in], or a stack [..., out, in]; the last two swapped where `transposed`.
        allowed: mask [all rows, in] of an earlier stage; what it pruned stays exactly as it is.
    """

    module: nn.Module
    pattern: NM
    transposed: bool = False
    parameter: str = "weight"
    allowed: Mask | None = None

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter)

    @property
    def cols(self) -> int:
        return self.weight.shape[-2 if self.transposed else -1]


@dataclass(frozen=True)
class FlowOptions:
    """How to get there; None: the kind's own default (`flow_schedule.KINDS`).

    Attributes:
        kind, steps, tail, decay: see `FlowSchedule`.
        straight: straight-through gradient instead of that of the product.
        shrink: lambda.
        decoupled: lambda acts on the weight; False: on the gradient.
    """

    kind: str
    steps: int
    tail: float = 0.2
    decay: float | None = None
    straight: bool | None = None
    shrink: float | None = None
    decoupled: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"schedule {self.kind!r} is unknown; allowed: {', '.join(KINDS)}")
        if self.shrink is not None and not 0 <= self.shrink < float("inf"):
            raise RecipeError(f"shrink must be at least 0, got {self.shrink:g}", hint="0 switches it off")

    def schedule(self, matrix: FlowMatrix) -> FlowSchedule:
        return FlowSchedule(self.kind, matrix.pattern, matrix.cols, self.steps, self.tail, self.decay)

    @property
    def is_straight(self) -> bool:
        return KINDS[self.kind].straight if self.straight is None else self.straight

    @property
    def rate(self) -> float:
        """lambda."""
        if self.shrink is not None:
            return self.shrink
        default = KINDS[self.kind].shrink
        return default if self.decoupled else min(default, SHRINK_IN_GRADIENT)


class Flow:
    """The matrices under way. `left_out`: (name, frame) of every frame that does not divide that matrix's inputs."""

    def __init__(
        self, matrices: Mapping[str, FlowMatrix], options: FlowOptions, model: nn.Module | None = None
    ) -> None:
        """Registers the parametrizations; the module classes change, the modules stay the same objects.

        Args:
            model: all modules, to find those outside `matrices` that share a parameter with one of them.

        Raises:
            RecipeError: a pattern that does not divide its matrix's inputs, a parameter that another module shares, or
                an option that cannot be; nothing was changed then.
        """
        self.options = options
        self.matrices = dict(matrices)
        _refuse_shared(self.matrices, model)
        for name, matrix in self.matrices.items():
            matrix.pattern.check(matrix.weight.numel() // matrix.cols, matrix.cols, name)
        schedules = {name: options.schedule(matrix) for name, matrix in self.matrices.items()}
        self.left_out = [(name, frame) for name, schedule in schedules.items() for frame in schedule.left_out]
        self.weights: dict[str, FlowWeight] = {}
        self._watched: set[int] = set()
        for name, matrix in self.matrices.items():
            weight = FlowWeight(
                matrix.weight, schedules[name],
                straight=options.is_straight, transposed=matrix.transposed, allowed=matrix.allowed,
            )  # fmt: skip
            parametrize.register_parametrization(matrix.module, matrix.parameter, weight)
            self.weights[name] = weight

    def at(self, step: int) -> None:
        """`step` optimizer steps were made. To be called before the first forward pass of every step; may repeat."""
        for weight in self.weights.values():
            weight.at(step)

    def reread(self) -> None:
        """Take step and masks from the buffers, after somebody wrote a saved state into them."""
        for weight in self.weights.values():
            weight.read_clock()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Have lambda act before every step of `optimizer`; a second call changes nothing.

        A step that a gradient scaler skips is skipped here too.
        """
        if self.options.rate and id(optimizer) not in self._watched:
            self._watched.add(id(optimizer))
            optimizer.register_step_pre_hook(self._before_step)

    def flip_rate(self) -> float:
        """Mean share of mask entries that changed per choice since the last call; 0 where none was made.

        A frame that tightens the pattern counts too.
        """
        chosen = [(torch.stack(w.flips).sum(), len(w.flips) * w.entries) for w in self.weights.values() if w.flips]
        for weight in self.weights.values():
            weight.flips.clear()
        return sum(float(flips) for flips, _ in chosen) / sum(size for _, size in chosen) if chosen else 0.0

    @property
    def sparsity(self) -> float:
        """Share of zeros that the patterns of the present step ask for."""
        weights = self.weights.values()
        zeros = sum(weight.schedule.phase(weight.step).pattern.sparsity * weight.entries for weight in weights)
        return zeros / sum(weight.entries for weight in weights)

    @property
    def beta(self) -> float:
        """Share of the forward value that is left outside the masks at the present step; the same for all."""
        return max(weight.schedule.phase(weight.step).beta for weight in self.weights.values())

    @torch.no_grad()
    def finish(self) -> dict[str, Mask]:
        """Remove the parametrizations. Weights are left masked, +0.0 outside the masks that are returned, by name.

        A mask that was not frozen is chosen now, from the weights as they are. Parameters stay the same objects. A
        model under FSDP2 is good for reading its weights afterwards, no longer for training.
        """
        self.reread()  # whoever undoes a sharding takes the modules back to what they were before
        masks = {}
        for name, matrix in self.matrices.items():
            flow, original = self.weights[name], self._original(name)
            flow.at(flow.schedule.steps)
            flow.choose(_whole(original))
            _local(original).masked_fill_(~_local_like(flow.shaped(flow.bits), original), 0.0)
            masks[name] = flow.mask()
            _remove(matrix.module, matrix.parameter)
        return masks

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for name, flow in self.weights.items():
            original = self._original(name)
            if id(original) not in rates or original.grad is None:
                continue
            outside = _local_like(flow.outside(), original)
            weight = _local(original)
            if self.options.decoupled:
                weight.copy_(torch.where(outside, weight * (1 - rates[id(original)] * self.options.rate), weight))
            else:
                _local(original.grad).add_(torch.where(outside, weight, 0.0), alpha=self.options.rate)

    def _original(self, name: str) -> Tensor:
        """w itself; looked up every time, as FSDP replaces parameters."""
        matrix = self.matrices[name]
        return matrix.module.parametrizations[matrix.parameter].original  # type: ignore[union-attr,index]


def _refuse_shared(matrices: Mapping[str, FlowMatrix], model: nn.Module | None) -> None:
    """RecipeError for a parameter with a second owner, whose forward pass would not see the mask."""
    weights = {name: matrix.weight for name, matrix in matrices.items()}
    found = list(weights.items()) if model is None else list(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for owner, weight in found:
        owners.setdefault(id(weight), []).append(owner)
    for name, weight in weights.items():
        if len(owners.get(id(weight), ())) > 1:
            raise RecipeError(
                f"the weight of {name} is shared by {' and '.join(owners[id(weight)])}: a mask would prune all of them",
                hint="leave it out; the head of a tied model is its embedding",
            )


def _remove(module: nn.Module, parameter: str) -> None:
    kinds = [kind for kind in type(module).__mro__ if parameter in kind.__dict__]
    module.__class__ = kinds[0]  # FSDP2 derives a class of its own from the parametrized one
    parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    """The part of a parameter that this process holds; writing to it writes to the parameter."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """The part of `whole`, equal on all processes, that belongs to this process' part of `parameter`."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
