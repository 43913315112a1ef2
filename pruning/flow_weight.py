"""Progressive gradient flow on one weight, as a torch parametrization: nothing else in the model changes.

    forward   v = w . f,  f = 1 inside the mask, beta outside it, 0 outside the mask of an earlier stage
    backward  product:   dL/dw = dL/dv . f               (the true gradient)
              straight:  dL/dw = dL/dv . allowed         (straight-through estimator)

The mask is chosen anew once after every optimizer step, at the first forward pass that follows, and kept bit-packed
beside the weight: micro-batches, recomputation under gradient checkpointing and a resumed run all see the same one.
From the schedule's freezing step on it stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..kernels.bitmask.dispatch import pack_bits, row_counts, unpack_bits
from .flow_schedule import FlowSchedule
from .mask import Mask

STEP, CHOSEN, STEPS = range(3)
NEVER = -1


class FlowWeight(nn.Module):
    """The parametrization of one weight: [out, in], [..., out, in], or with the last two swapped where `transposed`.

    Buffers, all in the state dict:
        bits: uint8 [rows, ceil(in / 8)], the mask as of step `chosen`; rows are all outputs, of all experts.
        allowed: the same for the mask of an earlier stage; absent where there is none.
        clock: int64 [3]: step, chosen (-1: never yet), steps of the whole schedule.
    """

    bits: Tensor
    allowed: Tensor | None
    clock: Tensor

    def __init__(
        self, weight: Tensor, schedule: FlowSchedule, *, straight: bool, transposed: bool, allowed: Mask | None = None
    ) -> None:
        super().__init__()
        self.schedule, self.straight, self.transposed = schedule, straight, transposed
        self._batch = weight.shape[:-2]
        self.entries = weight.numel()
        rows = self.entries // schedule.cols
        if allowed is not None and allowed.shape != (rows, schedule.cols):
            raise ValueError(f"the mask so far is {list(allowed.shape)}, the weight has {rows} rows of {schedule.cols}")
        bits = torch.zeros(rows, -(-schedule.cols // 8), dtype=torch.uint8, device=weight.device)
        self.register_buffer("bits", bits)
        self.register_buffer("allowed", None if allowed is None else allowed.bits.to(weight.device, copy=True))
        self.register_buffer("clock", torch.tensor([0, NEVER, schedule.steps], device=weight.device))
        self.read_clock()
        self.flips: list[Tensor] = []  # entries that changed, 0-dim, one per choice since somebody looked

    def at(self, step: int) -> None:
        """The schedule's position: `step` optimizer steps were made."""
        self.step = step
        self.clock[STEP] = step

    def forward(self, weight: Tensor) -> Tensor:
        """v, shaped like `weight`; the mask is chosen first where that is due."""
        self.choose(weight)
        phase = self.schedule.phase(self.step)
        return _Flow.apply(weight, self, phase.beta)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to the module's weight replaces w as a whole; the mask follows, unless it is frozen."""
        if not self._is_frozen:
            self._chosen_at(NEVER)
        return weight

    @torch.no_grad()
    def choose(self, weight: Tensor) -> None:
        """Choose the mask from `weight` unless it was chosen at this step or is frozen."""
        if self.chosen == self.step or self._is_frozen:
            return
        pattern = self.schedule.phase(self.step).pattern
        scores = self.rows(weight.detach()).abs()
        if self.allowed is not None:
            allowed = unpack_bits(self.allowed, self.schedule.cols)
            bits = pack_bits(pattern.mask(scores.masked_fill(~allowed, -1.0)) & allowed)
        else:
            bits = pack_bits(pattern.mask(scores))
        if self.chosen != NEVER:
            self.flips.append(row_counts(bits ^ self.bits).sum())
        self.bits.copy_(bits)
        self._chosen_at(self.step)

    def factor(self, tensor: Tensor, beta: float) -> Tensor:
        """tensor . f as a new tensor shaped like the weight: +0.0 where f is 0."""
        keep = self.shaped(self.bits)
        if beta == 0:
            return tensor.masked_fill(~keep, 0.0)
        result = tensor.clone() if beta == 1 else torch.where(keep, tensor, tensor * beta)
        return result if self.allowed is None else result.masked_fill_(~self.shaped(self.allowed), 0.0)

    def outside(self) -> Tensor:
        """bool, shaped like the weight: not in the mask, though an earlier stage's mask would allow it."""
        outside = ~self.shaped(self.bits)
        return outside if self.allowed is None else outside & self.shaped(self.allowed)

    def rows(self, weight: Tensor) -> Tensor:
        """[rows, in] of a tensor shaped like the weight."""
        return (weight.mT if self.transposed else weight).reshape(-1, self.schedule.cols)

    def shaped(self, bits: Tensor) -> Tensor:
        """bool shaped like the weight, of packed rows."""
        keep = unpack_bits(bits, self.schedule.cols).view(*self._batch, -1, self.schedule.cols)
        return keep.mT if self.transposed else keep

    def mask(self) -> Mask:
        """The mask as an explicit object, [rows, in]."""
        return Mask(self.bits.clone(), self.schedule.cols, str(self.schedule.target))

    @property
    def _is_frozen(self) -> bool:
        return self.chosen != NEVER and self.schedule.phase(self.chosen).frozen

    def _chosen_at(self, step: int) -> None:
        self.chosen = step
        self.clock[CHOSEN] = step

    def read_clock(self) -> None:
        """Follow the buffers, after somebody wrote a saved state into them. TrainingError for another schedule."""
        self.step, self.chosen, steps = self.clock.tolist()
        if steps != self.schedule.steps:
            raise TrainingError(
                f"the saved schedule has {steps} steps, this one {self.schedule.steps}",
                hint="resume with the options that the run began with",
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.read_clock()


class _Flow(torch.autograd.Function):
    """v = w . f. Saves nothing but the packed mask, which is read, not copied: it is the same until the next step."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, flow: FlowWeight, beta: float) -> Tensor:
        ctx.flow, ctx.beta = flow, beta
        return flow.factor(weight, beta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.flow.factor(gradient, 1.0 if ctx.flow.straight else ctx.beta), None, None
