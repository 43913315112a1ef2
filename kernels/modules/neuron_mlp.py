"""The gated MLP of a decoder layer, on a subset of its neurons where one is set."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import KernelError
from ..arguments import MAX_ROWS, check_weight, name
from ..channel_gemv.dispatch import transpose
from ..neuron_mlp.dispatch import ACTIVATIONS, neuron_mlp
from .siblings import wants_gradient
from .sparse_linear import checked
from .state import take_state


class NeuronSubsetMLP(nn.Module):
    """down(act(gate(x)) * up(x)) over the neurons of `active`, or all of them.

    Holds gate and up [inter, hidden] and down transposed, `down_t` [inter, hidden]: float32, bfloat16 or float16. With
    a set, 1 to 8 rows without gradient go through `neuron_mlp`. More rows, rows with a gradient, and no set are the
    three dense layers with all neurons, each rounded to x's dtype. `state_dict()` has the dense `gate_proj.weight`,
    `up_proj.weight` and `down_proj.weight`; the set belongs to the module.
    """

    gate: Tensor
    up: Tensor
    down_t: Tensor
    active: Tensor | None

    def __init__(self, gate: Tensor, up: Tensor, down_t: Tensor, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise KernelError(f"activation is {activation!r}, allowed: {', '.join(ACTIVATIONS)}")
        for what, weight in (("gate", gate), ("up", up), ("down_t", down_t)):
            check_weight(weight.detach(), what)
            if weight.shape != gate.shape or weight.dtype is not gate.dtype:
                raise KernelError(
                    f"{what} is {name(weight.dtype)} {list(weight.shape)}, it must be as gate, "
                    f"{name(gate.dtype)} {list(gate.shape)}"
                )
            self.register_buffer(what, weight.detach(), persistent=False)
        self.activation = activation
        self.register_buffer("active", None, persistent=False)

    @classmethod
    def from_dense(cls, gate: Tensor, up: Tensor, down: Tensor, activation: str = "silu") -> NeuronSubsetMLP:
        """From the weights of three nn.Linear: gate and up [inter, hidden], down [hidden, inter]."""
        return cls(gate, up, transpose(down.detach().cpu()).to(down.device), activation)

    @property
    def neurons(self) -> int:
        return self.gate.shape[0]

    def set_active(self, active: Tensor | None) -> None:
        """The neurons of all calls from now on: integers in any order, or None for all. KernelError if out of range."""
        if active is None:
            self.active = None
            return
        if active.dim() != 1 or active.is_floating_point() or active.is_complex() or active.dtype is torch.bool:
            raise KernelError(f"active is {name(active.dtype)} {list(active.shape)}, it must be integers [n]")
        chosen = active.unique().to(self.gate.device, torch.int32)
        if chosen.numel() and not 0 <= int(chosen[0]) <= int(chosen[-1]) < self.neurons:
            raise KernelError(f"active reaches from {int(chosen[0])} to {int(chosen[-1])} of {self.neurons} neurons")
        self.active = chosen

    def forward(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """active: int32, rising, for this call alone, instead of the set of the module."""
        x = checked(x, self.gate.shape[1], self.gate.dtype)
        chosen = self.active if active is None else active
        if chosen is None or not 1 <= x.shape[:-1].numel() <= MAX_ROWS or wants_gradient(x):
            inner = ACTIVATIONS[self.activation](functional.linear(x, self.gate)) * functional.linear(x, self.up)
            return functional.linear(inner, self.down_t.t())
        return neuron_mlp(x.contiguous(), self.gate, self.up, self.down_t, chosen, self.activation)

    def extra_repr(self) -> str:
        active = self.neurons if self.active is None else self.active.numel()
        return f"hidden={self.gate.shape[1]}, neurons={self.neurons}, active={active}, activation={self.activation}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "gate_proj.weight"] = self.gate
        destination[prefix + "up_proj.weight"] = self.up
        destination[prefix + "down_proj.weight"] = self.down_t.t().contiguous()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for layer, own in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down_t")):
            key, held = f"{prefix}{layer}.weight", getattr(self, own)
            wanted = held.t().shape if own == "down_t" else held.shape
            take = partial(self._take, own)
            take_state(key, wanted, take, state_dict, strict, missing_keys, unexpected_keys, error_msgs)

    def _take(self, own: str, weight: Tensor) -> None:
        held: Tensor = getattr(self, own)
        weight = weight.detach().to(held.device, held.dtype)
        setattr(self, own, transpose(weight.cpu()).to(held.device) if own == "down_t" else weight.clone())
