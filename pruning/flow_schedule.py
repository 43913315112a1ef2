"""Schedules of progressive gradient flow for N:M: which pattern and how much of the rest holds at a training step.

One family. At step t the forward pass of a matrix uses

    w . (m + (1 - m) beta(t)),   m = the N(t) largest |w| of every M(t) consecutive inputs of a row

and a schedule is nothing but (pattern(t), beta(t)), the gradient that w receives and the pull lambda of what is outside
the mask towards zero (`flow_weight.py`). With F = the first step of the frozen tail and u = t / F:

    mdgf-linear     N:M throughout          beta = max(1 - decay u, 0)    mask decay
    mdgf-exp        N:M throughout          beta = exp(-decay u)
    sdgf-stepwise   M-1:M, M/2:M, ... N:M   beta = 0                      structure decay, frames of equal length
    sdgf-geometric  8N:8M, 4N:4M, 2N:2M, N:M  beta = 0
    sr-ste          N:M throughout          beta = 0, straight-through gradient, lambda > 0
    ste             N:M throughout          beta = 0, straight-through gradient

From F on the mask is N:M, frozen as it is chosen at F, and beta is 0. Everything is a pure function of the step.

Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers", CPAL 2025 (mdgf, sdgf;
there decay is given per step); Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
ICLR 2021 (sr-ste); Bengio et al., 2013 (straight-through estimator).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import RecipeError
from .pattern import NM

GEOMETRIC_FACTORS = (8, 4, 2, 1)


@dataclass(frozen=True)
class Phase:
    """What holds at one step for one matrix. `frozen`: the mask is no longer chosen anew."""

    pattern: NM
    beta: float
    frozen: bool


@dataclass(frozen=True)
class Kind:
    """A schedule as numbers: what `FlowSchedule` and the training options fall back on.

    Attributes:
        frames: all patterns on the way to the target, the target last.
        beta: (u, decay) -> share of the forward value left outside the mask, u in [0, 1).
        decay: default rate in units of the progressive phase; None where beta is 0 throughout.
        straight: the straight-through gradient instead of that of the product.
        shrink: default lambda (decoupled, as AdamW's weight decay).
        summary: one line for people.
    """

    frames: Callable[[NM], tuple[NM, ...]]
    beta: Callable[[float, float], float]
    decay: float | None
    straight: bool
    shrink: float
    summary: str


def stepwise_frames(target: NM) -> tuple[NM, ...]:
    """M-1:M, M/2:M, M/4:M ... N:M, each rarer than the one before: 1:8 is reached through 7:8, 4:8, 2:8."""
    keeps = [target.group - 1]
    half = target.group // 2
    while half > target.keep:
        keeps.append(half)
        half //= 2
    rarer = sorted({keep for keep in keeps if keep > target.keep}, reverse=True)
    return (*(NM(keep, target.group) for keep in rarer), target)


def geometric_frames(target: NM) -> tuple[NM, ...]:
    """8N:8M, 4N:4M, 2N:2M, N:M: the same sparsity in ever smaller groups."""
    return tuple(NM(target.keep * factor, target.group * factor) for factor in GEOMETRIC_FACTORS)


def _at_once(target: NM) -> tuple[NM, ...]:
    return (target,)


def _nothing(progress: float, decay: float) -> float:
    return 0.0


KINDS: dict[str, Kind] = {
    "mdgf-exp": Kind(
        _at_once, lambda u, decay: math.exp(-decay * u), 5.0, False, 0.0,
        "mask decay: what is outside the mask fades out exponentially (Bambhaniya et al. 2025)",
    ),
    "mdgf-linear": Kind(
        _at_once, lambda u, decay: max(1.0 - decay * u, 0.0), 1.0, False, 0.0,
        "mask decay: what is outside the mask fades out linearly (Bambhaniya et al. 2025)",
    ),
    "sdgf-stepwise": Kind(
        stepwise_frames, _nothing, None, False, 0.0,
        "structure decay: M-1:M, M/2:M, M/4:M ... N:M in equal frames (Bambhaniya et al. 2025)",
    ),
    "sdgf-geometric": Kind(
        geometric_frames, _nothing, None, False, 0.0,
        "structure decay: 8N:8M, 4N:4M, 2N:2M, N:M in equal frames (Bambhaniya et al. 2025)",
    ),
    "sr-ste": Kind(
        _at_once, _nothing, None, True, 0.1,
        "straight-through gradient, what is outside the mask pulled towards zero (Zhou et al. 2021)",
    ),
    "ste": Kind(_at_once, _nothing, None, True, 0.0, "straight-through gradient, nothing else (Bengio et al. 2013)"),
}  # fmt: skip


@dataclass(frozen=True)
class FlowSchedule:
    """(pattern(t), beta(t)) of one matrix [out, in] over `steps` optimizer steps.

    Attributes:
        kind: a key of KINDS.
        target: the final N:M.
        cols: inputs of the matrix; frames whose group does not divide them are left out.
        steps: optimizer steps of the whole training; step t is the one before which t were made.
        tail: share of the steps, at the end, under the frozen final mask.
        decay: rate of beta; None: the kind's own.

    Raises:
        RecipeError: an unknown kind, no steps, a share outside [0, 1], a decay that is not positive or given to a kind
            that has none, or a target that does not divide `cols`.
    """

    kind: str
    target: NM
    cols: int
    steps: int
    tail: float = 0.2
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"schedule {self.kind!r} is unknown; allowed: {', '.join(KINDS)}")
        if self.steps < 1:
            raise RecipeError(f"a schedule needs at least one step, got {self.steps}", hint="train on more text")
        if not 0 <= self.tail <= 1:
            raise RecipeError(f"tail must be in [0, 1], got {self.tail:g}", hint="0.2 freezes the last fifth")
        self.target.check(1, self.cols, "the matrix")
        if self.decay is None:
            return
        if KINDS[self.kind].decay is None:
            raise RecipeError(
                f"schedule {self.kind} has no decay: nothing fades out in it",
                hint="decay belongs to mdgf-exp and mdgf-linear",
            )
        if not (self.decay > 0 and math.isfinite(self.decay)):
            raise RecipeError(
                f"decay must be positive, got {self.decay:g}",
                hint="1 makes mdgf-linear reach zero exactly where the frozen tail begins",
            )

    @property
    def freeze(self) -> int:
        """F, the first step of the frozen tail; `steps` without one (the mask is then chosen after the last step)."""
        return self.steps - round(self.tail * self.steps)

    @property
    def frames(self) -> tuple[NM, ...]:
        """The patterns that fit the matrix, in order, the target last; each holds for an equal share of F steps."""
        return tuple(frame for frame in KINDS[self.kind].frames(self.target) if self.cols % frame.group == 0)

    @property
    def left_out(self) -> tuple[NM, ...]:
        """Frames whose group does not divide the inputs."""
        return tuple(frame for frame in KINDS[self.kind].frames(self.target) if self.cols % frame.group)

    def phase(self, step: int) -> Phase:
        """What holds for the forward pass of step `step`, 0 <= step; from `steps` on, the end."""
        if step >= self.freeze:
            return Phase(self.target, 0.0, True)
        frames, kind = self.frames, KINDS[self.kind]
        decay = self.decay if self.decay is not None else (kind.decay or 0.0)
        return Phase(frames[step * len(frames) // self.freeze], kind.beta(step / self.freeze, decay), False)
