"""Dynamic sparse training as a method of fine-tuning: masks move under their budget while everything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ..errors import RecipeError
from ..kernels.bitmask.dispatch import pack_bits, unpack_bits
from ..pruning.pattern import Pattern, parse_pattern
from .drop_grow import move, share_at
from .masked import MaskGuard, agree_on_masks
from .methods import Attached, Method

BUFFER = "gossamer_moved_mask"  # beside the weight while it is trained: a checkpoint holds the mask of its moment


class Dst(Method):
    """Every masked linear layer keeps its number of zeros, not their places; masked experts keep both."""

    reads = frozenset({"every", "drop", "stop"})
    needs_masks = True

    def share(self, parameters: int, shapes: Sequence[tuple[int, int]], options: Mapping[str, Any]) -> float:
        return 1.0

    def attach(
        self, model: Any, masks: Mapping[str, Tensor], targets: Sequence[str], options: Mapping[str, Any], seed: int
    ) -> Attached:
        model.requires_grad_(True)
        moving = [name for name in targets if name in masks and isinstance(_owner(model, name), (nn.Linear, Conv1D))]
        if not moving:
            raise RecipeError(
                "dst moves masks, and no linear layer of the model has one",
                hint="put a prune stage before it, or start from a sparse checkpoint",
            )
        now = dict(masks)
        run = _Run(now, options["every"], options["drop"], options["stop"])
        for name in moving:
            run.add(name, _owner(model, name), _pattern(model, name))
        fixed = len(masks) - len(moving)
        notes = [f"{fixed} masks of fused experts do not move"] if fixed else []
        return Attached(now, run.finish, callbacks=(run,), kept=lambda: now, notes=notes)


@dataclass
class _Matrix:
    """One moving mask. `slope`: gradient of the step under way, summed over micro-batches; pruned entries count."""

    module: Any
    pattern: Pattern | None
    slope: Tensor | None = None

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    def rows(self, tensor: Tensor) -> Tensor:
        """[out, in] of a tensor shaped like the weight, and back."""
        return tensor.t() if self.transposed else tensor


class _Run(TrainerCallback):
    """Moves the masks `now` (parameter name -> bool) every so many steps, until `stop` of the run is over."""

    def __init__(self, now: dict[str, Tensor], every: int, drop: float, stop: float) -> None:
        self.now, self.every, self.drop, self.stop = now, every, drop, stop
        self.matrices: dict[str, _Matrix] = {}
        self.first = dict(now)
        self.guard: MaskGuard | None = None
        self.optimizer: Any = None
        self.looking = False
        self.moves = self.churned = 0
        self._handles: list[Any] = []

    def add(self, name: str, module: Any, pattern: Pattern | None) -> None:
        matrix = self.matrices[name] = _Matrix(module, pattern)
        module.register_buffer(BUFFER, pack_bits(matrix.rows(self.now[name]).contiguous()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """After a checkpoint was loaded, and before masks are laid on: hooks here see whole gradients."""
        for name, matrix in self.matrices.items():
            cols = self.now[name].shape[0 if matrix.transposed else 1]
            self.now[name] = matrix.rows(unpack_bits(getattr(matrix.module, BUFFER), cols)).contiguous()
            self._handles.append(matrix.module.weight.register_post_accumulate_grad_hook(self._look(matrix)))

    def take_guard(self, guard: MaskGuard, optimizer: torch.optim.Optimizer, step: int) -> None:
        """The guard of this training."""
        self.guard, self.optimizer = guard, optimizer

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        after = state.global_step + 1
        end = int(self.stop * state.max_steps)
        self.looking = after % self.every == 0 and share_at(after, end, self.drop) > 0

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Before a checkpoint is saved."""
        if not self.looking:
            return
        self.looking = False
        assert self.guard is not None
        share = share_at(state.global_step, int(self.stop * state.max_steps), self.drop)
        for name, matrix in self.matrices.items():
            own = matrix.module.weight.detach()
            slope = _whole(torch.zeros_like(own) if matrix.slope is None else matrix.slope, args.world_size > 1)
            matrix.slope = None
            if not bool(slope.any()):
                continue  # not part of this step's forward pass, on any process
            weight, keep = _whole(own), matrix.rows(self.now[name]).to(slope.device)
            moved = move(matrix.rows(weight), matrix.rows(slope), keep, share, matrix.pattern)
            self.churned += int((moved & ~keep).sum())
            self.now[name] = matrix.rows(moved).contiguous()
            getattr(matrix.module, BUFFER).copy_(pack_bits(moved.contiguous()))
            self.guard.replace(name, self.now[name])
        self.moves += 1
        self.guard.apply(self.optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **more: Any) -> None:
        """Churn: share of the kept weights that changed place per move, since the last line."""
        if logs is not None and "loss" in logs:
            kept = sum(int(self.now[name].sum()) for name in self.matrices)
            logs["churn"] = self.churned / (kept * self.moves) if self.moves else 0.0
            self.moves = self.churned = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if args.world_size > 1 and self.guard is not None:
            agree_on_masks(self.guard)

    def finish(self) -> dict[str, Any]:
        """An ordinary model again."""
        for handle in self._handles:
            handle.remove()
        for matrix in self.matrices.values():
            delattr(matrix.module, BUFFER)
        moved = sum(int((self.now[name] & ~self.first[name].to(self.now[name].device)).sum()) for name in self.matrices)
        return {"moved": moved, "moving": len(self.matrices)}

    def _look(self, matrix: _Matrix) -> Any:
        def hook(parameter: Any) -> None:
            if self.looking:
                gradient = parameter.grad.detach()
                matrix.slope = gradient.clone() if matrix.slope is None else matrix.slope + gradient

        return hook


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _pattern(model: Any, name: str) -> Pattern | None:
    """The structure that the mask promises; "mixed" promises none."""
    text = getattr(model, "gossamer_masks", {})[name].pattern if hasattr(model, "gossamer_masks") else "mixed"
    return None if text == "mixed" else parse_pattern(text)


def _whole(tensor: Any, summed: bool = False) -> Any:
    """All of a sharded tensor; `summed`: of one that is not sharded, the sum over all processes."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if summed:
        torch.distributed.all_reduce(tensor)
    return tensor
