"""Skipping for layers that no kernel skips with: the same numbers, computed by the layer itself from zeroed inputs.

For bases in other formats (bitsandbytes, int8 values, models spread over devices) and MLPs of other shapes. Hooks of
torch: class, parameters and state dict of the layers stay as they are, and nothing is read less.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import MAX_ROWS
from ..channel_gemv.reference import active
from ..neuron_mlp.dispatch import ACTIVATIONS
from .siblings import wants_gradient
from .step import current_step


def _sparse(x: Tensor) -> bool:
    return 1 <= x.shape[:-1].numel() <= MAX_ROWS and not wants_gradient(x) and not current_step().dense


class MaskedInputs:
    """What ThresholdLinear computes for sparse rows, for any layer; vectors as there."""

    def __init__(
        self,
        threshold: Tensor,
        center: Tensor | None = None,
        shift: Tensor | None = None,
        left: Tensor | None = None,
        right: Tensor | None = None,
    ) -> None:
        self.threshold, self.center, self.shift, self.left, self.right = threshold, center, shift, left, right
        self._calls = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedInputs:
        return MaskedInputs(self.threshold, self.center, self.shift, self.left, self.right)

    def attach(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self.before)
        layer.register_forward_hook(self.after)

    def before(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        self._calls.dropped = None
        if not _sparse(x):
            return None
        inputs = x if self.center is None else (x.float() - self.center.to(x.device)).to(x.dtype)
        mask, none = active(inputs, self.threshold.to(x.device)), inputs.new_zeros(())
        self._calls.dropped = torch.where(mask, none, inputs)
        return (torch.where(mask, inputs, none), *args[1:])

    def after(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        dropped = self._calls.__dict__.pop("dropped", None)
        if dropped is None:
            return y
        if self.left is not None and self.right is not None:
            right, left = self.right.to(y.device), self.left.to(y.device)
            y = y + functional.linear(functional.linear(dropped.float(), right), left).to(y.dtype)
        return y if self.shift is None else y + self.shift.to(y)


class MaskedNeurons:
    """What NeuronSubsetMLP computes for sparse rows, for layers of any kind, gated or not: the input of down is zeroed.

    `threshold`: float32 [neurons] for the activated gate; None for the neurons of the sequence, which the step knows as
    those of `name`.
    """

    def __init__(self, name: str, activation: str, *, threshold: Tensor | None = None, fused: bool = False) -> None:
        self.name, self.activation, self.threshold, self.fused = name, activation, threshold, fused
        self._calls = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedNeurons:
        return MaskedNeurons(self.name, self.activation, threshold=self.threshold, fused=self.fused)

    def attach(self, gate: nn.Module | None, down: nn.Module) -> None:
        if self.threshold is not None and gate is not None:
            gate.register_forward_hook(self.after_gate)
        down.register_forward_pre_hook(self.before_down)

    def after_gate(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if _sparse(args[0]) and self.threshold is not None:
            gate = y.chunk(2, dim=-1)[0] if self.fused else y
            self._calls.mask = active(ACTIVATIONS[self.activation](gate), self.threshold.to(y.device))

    def before_down(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inner, step = args[0], current_step()
        if step.neurons is not None and (step.dense or step.watched):
            step.neurons.observe(self.name, inner)
        if not _sparse(inner) or step.watched:
            return None
        mask = self._calls.__dict__.pop("mask", None) if self.threshold is not None else self._of_sequences(inner)
        return None if mask is None else (torch.where(mask, inner, inner.new_zeros(())), *args[1:])

    def _of_sequences(self, inner: Tensor) -> Tensor | None:
        neurons = current_step().neurons
        chosen = None if neurons is None else neurons.chosen(self.name, inner.shape[0])
        if chosen is None:
            return None
        mask = torch.ones(inner.shape[0], inner.shape[-1], dtype=torch.bool, device=inner.device)
        for row, one in zip(mask, chosen, strict=True):
            if one is not None:
                row.zero_()[one.long()] = True
        return mask if inner.dim() == 2 else mask[:, None]
