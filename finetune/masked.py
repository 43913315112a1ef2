"""Training under fixed masks: gradients, weights and optimizer state stay zero where the mask is, and that is proved.

Three places could revive a pruned weight: its gradient, decoupled weight decay or momentum of an earlier life, and an
optimizer that moves weights without a gradient. So gradients are masked as they are accumulated (before anyone clips
them: a gradient that is thrown away must not use up the clipping norm), and weights and every state tensor of their
shape after each step. Masks are explicit; nothing is ever inferred from a zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, Union

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..kernels.bitmask.dispatch import pack_bits


class AsBool(Protocol):
    """A mask object of any kind: `pruning.mask.Mask`, or a checkpoint's mask."""

    def to_bool(self) -> Tensor: ...


Masks = Mapping[str, Union[Tensor, AsBool]]


class MaskGuard:
    """Holds the masks of a model's parameters while it is trained.

    Use: `guard = MaskGuard(model, masks)`, `guard.watch(optimizer)`, train, `guard.prove()` before every save,
    `guard.detach()`. Under FSDP2 create it after `fully_shard`: a mask becomes a DTensor of its parameter's placement.

    Args:
        model: its parameters are modified in place: pruned entries are set to +0.0 at once.
        masks: parameter name -> bool tensor of the parameter's own shape (True = kept), or an object with `to_bool()`.

    Raises:
        TrainingError: a mask without a parameter, or of another shape.
    """

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._entries: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._digests: dict[str, str] = {}
        self._handles: list[Any] = []
        self._watched: dict[int, Any] = {}
        self._shadows: list[Mapping[str, Tensor]] = []
        for name, mask in masks.items():
            if name not in parameters:
                raise TrainingError(f"there is a mask for {name}, but the model has no such parameter")
            self._parameters[name] = parameters[name]
            self._set(name, mask if isinstance(mask, Tensor) else mask.to_bool())
        self.attach()
        self.apply()

    def attach(self) -> None:
        """Mask every gradient as soon as it is accumulated. A second call changes nothing."""
        if self._handles:
            return
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._mask_gradient(name)))

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask weights and optimizer state after every step of `optimizer`. A second call changes nothing."""
        if id(optimizer) not in self._watched:
            self._watched[id(optimizer)] = optimizer.register_step_post_hook(lambda stepped, *_: self.apply(stepped))

    def follow(self, tensors: Mapping[str, Tensor]) -> None:
        """Mask these too after every step (parameter name -> a tensor of its shape): an average of weights, masters."""
        self._shadows.append(tensors)

    def detach(self) -> None:
        """Remove every hook. Masks stay known, so that `prove` still works; a second call changes nothing."""
        for handle in [*self._handles, *self._watched.values()]:
            handle.remove()
        self._handles.clear()
        self._watched.clear()

    def replace(self, name: str, mask: Tensor | AsBool) -> None:
        """Another mask for a parameter that has one, for methods that move masks. Takes effect with the next step."""
        if name not in self._parameters:
            raise TrainingError(f"{name} has no mask that could be replaced")
        self._set(name, mask if isinstance(mask, Tensor) else mask.to_bool())

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write +0.0 at every pruned entry of the weights, of what `follow` named and of the optimizer's state."""
        for name, parameter in self._parameters.items():
            pruned = self._pruned(name)
            _zero(parameter.detach(), pruned)
            for shadow in self._shadows:
                if name in shadow:
                    _zero(shadow[name], pruned)
            if optimizer is not None:
                _zero_state(optimizer.state.get(parameter, {}), pruned)

    @torch.no_grad()
    def prove(self) -> int:
        """The number of pruned entries, after it was checked that every one of them is exactly +0.0.

        Raises:
            TrainingError: one is not; which matrix, and how many.
        """
        total = 0
        for name, parameter in self._parameters.items():
            pruned = self._pruned(name)
            alive = _count(pruned & ((parameter.detach() != 0) | torch.signbit(parameter.detach())))
            if alive:
                raise TrainingError(
                    f"{alive} pruned weights of {name} are no longer zero",
                    hint="something changed weights behind the mask; nothing was saved",
                )
            total += _count(pruned)
        return total

    @property
    def zeros(self) -> int:
        """Pruned entries, by the masks."""
        return sum(_count(self._pruned(name)) for name in self._parameters)

    @property
    def size(self) -> int:
        """Entries of all masked parameters."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def sparsity(self) -> float:
        """Share of pruned entries among the masked parameters."""
        return self.zeros / self.size if self._parameters else 0.0

    def shape(self, name: str) -> torch.Size:
        """Of the parameter, and so of its mask."""
        return self._parameters[name].shape

    def digests(self) -> dict[str, str]:
        """Parameter -> sha256 of its mask's bits: equal on every rank, and unchanged by training."""
        return dict(self._digests)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def _set(self, name: str, mask: Tensor) -> None:
        parameter = self._parameters[name]
        if mask.shape != parameter.shape or mask.dtype is not torch.bool:
            raise TrainingError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}, the parameter is {list(parameter.shape)}",
                hint="a mask is bool, True where the weight is kept, and has the parameter's own shape",
            )
        self._digests[name] = hashlib.sha256(
            pack_bits(mask.reshape(-1, mask.shape[-1]).cpu()).contiguous().numpy().tobytes()
        ).hexdigest()
        self._entries[name] = ~_like(mask, parameter)

    def _pruned(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if self._entries[name].device != parameter.device:  # moved since, as the Trainer does
            self._entries[name] = self._entries[name].to(parameter.device)
        return self._entries[name]

    def _mask_gradient(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._pruned(name), 0.0)

        return hook


def agree_on_masks(guard: MaskGuard) -> None:
    """TrainingError on every rank when ranks hold different masks. Does nothing in a single process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, guard.digests())
    for rank, digests in enumerate(found):
        differing = sorted(name for name in {*digests, *found[0]} if digests.get(name) != found[0].get(name))
        if differing:
            raise TrainingError(f"rank {rank} holds another mask of {differing[0]} than rank 0")


def _like(mask: Tensor, parameter: Any) -> Tensor:
    """The mask on the parameter's device, and as a DTensor of its placement where the parameter is one."""
    mask = mask.to(parameter.device)
    if not hasattr(parameter, "placements"):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mask, parameter.device_mesh, parameter.placements)


def _zero(tensor: Tensor, pruned: Tensor) -> None:
    tensor.masked_fill_(pruned, 0.0)


def _zero_state(state: Mapping[str, Any], pruned: Tensor) -> None:
    """Every state tensor of the parameter's shape; 8-bit ones hold codes, and zero is a code of its own."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.shape != pruned.shape:
            continue
        if value.dtype is torch.uint8:
            value.masked_fill_(pruned, _code_of_zero(state, name))
        elif value.is_floating_point():
            value.masked_fill_(pruned, 0.0)


def _code_of_zero(state: Mapping[str, Any], name: str) -> int:
    """bitsandbytes keeps "state1" as codes of the map "qmap1", which holds 0.0 exactly."""
    codes = state.get(name.replace("state", "qmap"))
    if codes is None:
        raise TrainingError(f"the optimizer keeps {name!r} in 8 bits without a map that says what its codes mean")
    return int(codes.abs().argmin())


def _count(flags: Tensor) -> int:
    total = flags.sum()
    return int(total.full_tensor() if hasattr(total, "full_tensor") else total)


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of these names."""
    found = dict(model.named_parameters(remove_duplicate=False))
    return {name: found[name] for name in names}
