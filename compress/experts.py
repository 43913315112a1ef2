"""Fused 3-D experts, one expert at a time, through a function registered with transformers' experts interface.

The default implementations multiply all experts at once, so no hook can see one expert's input, and no packed matrix
can take part. Ours computes the same sum expert by expert, shows every input to a tap, and knows packed stacks. It is
switched on while a block is being observed, and for models whose experts are packed; everywhere else the model's own
default runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..kernels.modules.packed_stack import PackedStack
from .hf_private import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "gossamer_observed"
EXPERTS = "gossamer"  # the same function, for experts whose matrices are packed
_TAP = "_gossamer_tap"

# tap(stack name "gate_up_proj" | "up_proj" | "down_proj", expert, input [tokens of that expert, in])
Tap = Callable[[str, int, torch.Tensor], None]


def observed_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts forward with a tap: [tokens, d], [tokens, k], [tokens, k] -> [tokens, d].

    Every expert is shown, also one that no token chose (0 rows). The order of additions is that of the default
    (per token, over its k experts), so results agree with it to the rounding of the matrix products.
    """
    tap: Tap | None = self.__dict__.get(_TAP)
    tokens, k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(ids, minlength=self.num_experts)[: self.num_experts].tolist()
    outputs = hidden_states.new_zeros(tokens * k, hidden_states.shape[-1])
    start = 0
    for expert, count in enumerate(counts):
        if not count and tap is None:
            continue
        places = order[start : start + count]
        outputs[places] = _one_expert(self, expert, hidden_states[places // k], tap).to(outputs.dtype)
        start += count
    weighted = outputs * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _one_expert(module: Any, expert: int, x: torch.Tensor, tap: Tap | None) -> torch.Tensor:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if tap is not None:
        tap(first, expert, x)
    h = _linear(module, first, expert, x)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    if tap is not None:
        tap("down_proj", expert, h)
    out = _linear(module, "down_proj", expert, h)
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _linear(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    stack = getattr(module, name)
    if isinstance(stack, PackedStack):
        out = stack(expert, x)
    else:
        out = x @ stack[expert] if module.is_transposed else nn.functional.linear(x, stack[expert])
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out


@contextmanager
def tapped(module: Any, tap: Tap) -> Iterator[None]:
    """Inside: the fused experts `module` runs `observed_experts` with `tap`. The module's config must be its own."""
    before = module.config._experts_implementation
    module.config._experts_implementation = IMPLEMENTATION
    module.__dict__[_TAP] = tap
    try:
        yield
    finally:
        del module.__dict__[_TAP]
        module.config._experts_implementation = before


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts)
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, observed_experts)
