"""PST: pruning while fine-tuning with few trainable numbers (Li et al., IJCAI 2022, arXiv 2205.11005).

A frozen matrix W [out, in] is pruned by a score that is learned through thin factors, and corrected by one more:

    W' = W + beta U V                                     U [out, rw], V [rw, in]
    S  = |W'| + a1 A B + a2 (R 1^T + 1 C^T)               A [out, rm], B [rm, in], R [out], C [in]
    forward: W' * M, M = 1 where S is among the kept; backward: dL/dS = dL/dM (straight through)

so A, B, R and C learn from what a weight's presence does to the loss, |W'| being the part that needs no data. Only the
factors are trained: (out + in)(rw + rm) + out + in numbers per matrix. Nothing of size [out, in] is kept for the
backward pass: W' and M are made again from the factors there. The threshold that M compares with is found by rank and
refreshed every few steps; N:M patterns are ranked inside their groups at every step. What is written in the end is
selected by rank with an exact count, among the weights that an earlier mask left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..pruning.pattern import NM, Pattern, Unstructured
from ..pruning.selection import keep_all_but, keep_in_groups


@dataclass(frozen=True)
class PstConfig:
    """Names of the paper in brackets.

    `rank`: of the correction (rw); `score_rank`: of the learned score (rm); `beta`, `alpha`, `gamma` (beta, alpha1,
    alpha2): their weights. `initial`: sparsity of the first steps; `warmup` (w0) and `tail` (w1): shares of the steps
    before and after the cubic ramp. `refresh`: steps between two thresholds.
    """

    rank: int = 8
    score_rank: int = 8
    beta: float = 1.0
    alpha: float = 1.0
    gamma: float = 1.0
    initial: float = 0.0
    warmup: float = 0.1
    tail: float = 0.3
    refresh: int = 10

    def __post_init__(self) -> None:
        if min(self.rank, self.score_rank, self.refresh) < 1:
            raise RecipeError(
                f"rank {self.rank}, score rank {self.score_rank} and refresh {self.refresh} must be at least 1"
            )
        if not 0 <= self.initial < 1:
            raise RecipeError(f"the initial sparsity must be in [0, 1), got {self.initial:g}")
        if min(self.warmup, self.tail) < 0 or self.warmup + self.tail > 1:
            raise RecipeError(
                f"warm-up {self.warmup:g} and tail {self.tail:g} are shares of the steps and may not exceed 1 together"
            )


def cubic_sparsity(step: int, steps: int, final: float, config: PstConfig) -> float:
    """s(t) = sf + (s0 - sf)(1 - (t - w0 T) / (T - (w0 + w1) T))^3 between warm-up and tail, constant in both."""
    begin, end = config.warmup * steps, steps - config.tail * steps
    if step <= begin and begin > 0:
        return config.initial
    if step >= end:
        return final
    left = 1 - (step - begin) / (end - begin)
    return final + (config.initial - final) * left**3


class PstWeight(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) that turns a frozen weight into its masked, corrected form.

    Args:
        weight: the frozen matrix as its module stores it.
        pattern: `Unstructured` (its sparsity is reached over the schedule) or `NM` (held from the end of the warm-up).
        transposed: the module stores [in, out], as GPT-2's Conv1D does.
        allowed: bool [out, in], False where an earlier mask prunes: such weights stay zero.
        seed: of U and A; the other factors begin at zero, so that the first forward pass is that of the weight itself.

    Raises:
        RecipeError: a pattern that is neither, does not fit, or keeps more than the earlier mask.
    """

    threshold: Tensor
    sparsity: Tensor
    allowed: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        pattern: Pattern,
        config: PstConfig | None = None,
        *,
        transposed: bool = False,
        allowed: Tensor | None = None,
        seed: int = 0,
        name: str = "the matrix",
    ) -> None:
        super().__init__()
        config = config or PstConfig()
        rows, cols = reversed(weight.shape) if transposed else weight.shape
        if not isinstance(pattern, (Unstructured, NM)):
            raise RecipeError(f"PST prunes unstructured or N:M, not {pattern}")
        pattern.check(rows, cols, name)
        self.pattern, self.config, self.transposed = pattern, config, transposed
        generator = torch.Generator().manual_seed(seed)

        def factor(*shape: int, zero: bool = False) -> nn.Parameter:
            values = torch.zeros(shape) if zero else torch.randn(shape, generator=generator)
            return nn.Parameter(values.to(weight.device))

        self.left, self.right = factor(rows, config.rank), factor(config.rank, cols, zero=True)
        self.score_left, self.score_right = factor(rows, config.score_rank), factor(config.score_rank, cols, zero=True)
        self.row_score, self.column_score = factor(rows, zero=True), factor(cols, zero=True)
        self.register_buffer("threshold", torch.tensor(-math.inf, device=weight.device))
        self.register_buffer("sparsity", torch.tensor(config.initial, device=weight.device))
        self.register_buffer("allowed", None if allowed is None else allowed.to(weight.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.t() if self.transposed else weight
        group = (self.pattern.keep, self.pattern.group) if isinstance(self.pattern, NM) and self.sparsity > 0 else None
        masked = _Masked.apply(
            matrix, self.left, self.right, self.score_left, self.score_right, self.row_score, self.column_score,
            self.threshold, self.allowed, group, self.config,
        )  # fmt: skip
        return masked.t() if self.transposed else masked

    @torch.no_grad()
    def advance(self, weight: Tensor, step: int, steps: int) -> None:
        """The schedule at optimizer step 0 <= `step` < `steps`; `weight` is the frozen one, as its module stores it.

        The threshold is found anew every `refresh` steps, in short runs every twentieth of them, and where the sparsity
        that is asked for is reached.
        """
        final = self.pattern.sparsity
        target = cubic_sparsity(step, steps, final, self.config)
        reached = target == final and step > 0 and cubic_sparsity(step - 1, steps, final, self.config) != final
        due = reached or step % max(1, min(self.config.refresh, steps // 20)) == 0
        self.sparsity.fill_(target)
        if isinstance(self.pattern, NM):
            self.sparsity.fill_(final if step >= self.config.warmup * steps else 0.0)
        elif due:
            scores = self.scores(weight)
            zeros = round(float(self.sparsity) * scores.numel())
            lowest = -math.inf if zeros == 0 else float(scores.reshape(-1).kthvalue(zeros).values)
            self.threshold.fill_(lowest)

    @torch.no_grad()
    def scores(self, weight: Tensor) -> Tensor:
        """S float32 [out, in]; minus infinity where an earlier mask prunes."""
        matrix = weight.t() if self.transposed else weight
        effective = _effective(matrix, self.left, self.right, self.config.beta)
        found = _score(effective, self.score_left, self.score_right, self.row_score, self.column_score, self.config)
        return found if self.allowed is None else found.masked_fill(~self.allowed, -math.inf)

    @torch.no_grad()
    def finish(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(weight with +0.0 where pruned, mask), both as the module stores them; exact counts by rank."""
        scores = self.scores(weight)
        if isinstance(self.pattern, NM):
            keep = keep_in_groups(scores, self.pattern.keep, self.pattern.group)
        else:
            keep = keep_all_but(scores, self.pattern.zeros(*scores.shape))
        if self.allowed is not None:
            keep &= self.allowed
        matrix = weight.t() if self.transposed else weight
        pruned = _effective(matrix, self.left, self.right, self.config.beta).to(weight.dtype).masked_fill_(~keep, 0.0)
        if self.transposed:
            pruned, keep = pruned.t(), keep.t()
        return pruned.contiguous(), keep.contiguous()

    @property
    def trainable(self) -> int:
        """Numbers that are trained for this matrix."""
        return sum(parameter.numel() for parameter in self.parameters())


class _Masked(torch.autograd.Function):
    """W' * M, keeping only what it was made from: W' and M are made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, left: Tensor, right: Tensor, score_left: Tensor, score_right: Tensor, row: Tensor,
        column: Tensor, threshold: Tensor, allowed: Tensor | None, group: tuple[int, int] | None, config: PstConfig,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight, left, right, score_left, score_right, row, column, threshold, allowed)
        ctx.group, ctx.config = group, config
        with torch.autocast(weight.device.type, enabled=False):  # as in the backward pass: the same mask
            effective = _effective(weight, left, right, config.beta)
            scores = _score(effective, score_left, score_right, row, column, config)
        return effective.masked_fill_(~_keep(scores, threshold, allowed, group), 0.0).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, left, right, score_left, score_right, row, column, threshold, allowed = ctx.saved_tensors
        config = ctx.config
        effective = _effective(weight, left, right, config.beta)
        scores = _score(effective, score_left, score_right, row, column, config)
        keep = _keep(scores, threshold, allowed, ctx.group)
        grad = grads[0].to(effective.dtype)
        to_score = grad * effective
        if allowed is not None:
            to_score.masked_fill_(~allowed, 0.0)
        to_weight = grad.masked_fill(~keep, 0.0).addcmul_(to_score, effective.sign())
        return (
            None,
            config.beta * to_weight @ right.t(),
            config.beta * left.t() @ to_weight,
            config.alpha * to_score @ score_right.t(),
            config.alpha * score_left.t() @ to_score,
            config.gamma * to_score.sum(1),
            config.gamma * to_score.sum(0),
            None,
            None,
            None,
            None,
        )


def _effective(weight: Tensor, left: Tensor, right: Tensor, beta: float) -> Tensor:
    return torch.addmm(weight.to(left.dtype), left, right, alpha=beta)


def _score(effective: Tensor, left: Tensor, right: Tensor, row: Tensor, column: Tensor, config: PstConfig) -> Tensor:
    learned = torch.addmm(effective.abs(), left, right, alpha=config.alpha)
    return learned.add_(row.unsqueeze(1), alpha=config.gamma).add_(column, alpha=config.gamma)


def _keep(scores: Tensor, threshold: Tensor, allowed: Tensor | None, group: tuple[int, int] | None) -> Tensor:
    """What is kept. `scores` is overwritten where an earlier mask prunes: a group does not choose such weights."""
    if allowed is not None:
        scores = scores.masked_fill_(~allowed, -math.inf)
    keep = scores > threshold if group is None else keep_in_groups(scores, *group)
    return keep if allowed is None else keep & allowed
