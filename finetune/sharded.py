"""A model that FSDP2 has sharded, made whole again: `fully_shard` works in place and knows no way back.

Iterative methods train one model several times and look at all of its weights in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state


@dataclass(frozen=True)
class _Remembered:
    """A module as it was: class and attributes, dicts of hooks and children copied; names of parameters, no tensors."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, tuple[int, bool] | None]


def remember(model: nn.Module) -> list[_Remembered]:
    """What `restore` needs; taken before the model is sharded. Holds no tensor but buffers."""
    found = []
    for module in model.modules():
        attributes = {
            name: value.copy() if isinstance(value, dict) else value
            for name, value in vars(module).items()
            if name != "_parameters"
        }
        own = {name: None if p is None else (id(p), p.requires_grad) for name, p in module._parameters.items()}
        found.append(_Remembered(module, type(module), attributes, own))
    return found


@torch.no_grad()
def restore(remembered: list[_Remembered]) -> None:
    """Every rank gets all of every parameter; shared parameters are shared again. A collective operation."""
    made: dict[int, nn.Parameter] = {}
    for one in remembered:
        parameters: dict[str, nn.Parameter | None] = {}
        for name, known in one.parameters.items():
            if known is None:
                parameters[name] = None
                continue
            identity, trainable = known
            if identity not in made:
                whole = gathered(one.module._parameters[name].detach())  # type: ignore[union-attr]
                made[identity] = nn.Parameter(whole, requires_grad=trainable)
            parameters[name] = made[identity]
        buffers = dict(one.module._buffers)
        one.module.__class__ = one.kind
        vars(one.module).clear()
        vars(one.module).update(one.attributes)
        _forget(one.module)
        one.module._parameters = parameters
        one.module._buffers = buffers


def _forget(module: nn.Module) -> None:
    """torch remembers outside of the module that it was sharded, and refuses to shard it again."""
    known: Any = getattr(_composable_state, "_module_state_mapping", {})
    known.pop(module, None)


def gathered(tensor: Any) -> Tensor:
    """All of a sharded tensor, on every rank; another one as it is. A collective operation."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
