"""What a policy computes, in plain torch on any device: the definition that modules and kernels are tested against.

Everything takes all tokens of a window at once, dense up to a position and sparse from there on, so that one pass
evaluates a dense prompt and what is decoded after it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import GateThreshold, LinearPolicy

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def centered(x: Tensor, policy: LinearPolicy) -> Tensor:
    """x' [..., in], in x's dtype."""
    return x if policy.center is None else (x.float() - policy.center).to(x.dtype)


def active(x: Tensor, threshold: Tensor) -> Tensor:
    """bool like x: which entries count. NaN does."""
    return ~(x.float().abs() <= threshold)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, policy: LinearPolicy) -> Tensor:
    """y [..., out] for sparse tokens x [..., in], weight [out, in]: sums in float32, rounded to x's dtype.

    The product and the residual are rounded once each, then bias + shift (rounded to x's dtype) is added.
    """
    x = centered(x, policy)
    mask = active(x, policy.threshold)
    kept = torch.where(mask, x, x.new_zeros(()))
    y = F.linear(kept.float(), weight.float()).to(x.dtype)
    if policy.left is not None and policy.right is not None:
        dropped = torch.where(mask, x.new_zeros(()), x).float()
        y = y + F.linear(F.linear(dropped, policy.right), policy.left).to(x.dtype)
    if policy.shift is not None:
        shift = policy.shift if bias is None else bias.float() + policy.shift
        return y + shift.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def gate_active(gate: Tensor, policy: GateThreshold) -> Tensor:
    """bool [..., neurons] from gate = W_gate x (+ b), before the activation."""
    return active(ACT[policy.parts.activation](gate), policy.threshold)


def neurons_only(inner: Tensor, mask: Tensor) -> Tensor:
    """The input of down when only the neurons of `mask` [..., neurons] are computed; inner = act(gate x) * up x."""
    return torch.where(mask, inner, inner.new_zeros(()))
