"""What tells the modules of a model whether tokens are dense or sparse, and keeps the state of its sequences.

Tokens of a prompt are dense, decoded ones are sparse (calls.py says which are which). What a prompt decides (core
neurons) is kept with its cache, so that any number of sequences can be generated in turns, copied and continued.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ...activation_sparsity.base import CoreNeurons, Policy
from ...activation_sparsity.sequences import Sequences
from ...kernels.modules.counting import counts
from ...kernels.modules.step import Step, enter, leave
from .calls import is_prompt, length
from .padding import real_tokens

_ATTRIBUTE = "_gossamer_sequences"


class StepHook:
    """Hooks of the module that owns the blocks of a model. Copies of a model get one of their own."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._keeps_state = policy.guide is not None and any(
            isinstance(mlp, CoreNeurons) for mlp in policy.mlps.values()
        )
        self._calls = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepHook:
        return StepHook(self.policy)

    def attach(self, owner: nn.Module) -> None:
        """Hook `owner`, whose call has `past_key_values`, `attention_mask` and the token ids or embeddings."""
        owner.register_forward_pre_hook(self.before, with_kwargs=True)
        owner.register_forward_hook(self.after, with_kwargs=True, always_call=True)

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        calls = self._calls.__dict__.setdefault("open", [])
        batch, tokens = _rows(args, kwargs)
        cache = kwargs.get("past_key_values")
        dense = is_prompt(cache, tokens)
        state, watched = self._state(cache, batch, tokens, kwargs, dense)
        counted = counts()
        if counted is not None and not dense:
            counted.steps += 1
        calls.append((enter(Step(dense, watched, state)), state, dense))

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        opened = self._calls.__dict__.get("open")
        if not opened:
            return
        token, state, dense = opened.pop()
        leave(token)
        if state is None:
            return
        if not dense:
            state.stepped()
            return
        state.end()
        cache = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if cache is not None:
            setattr(cache, _ATTRIBUTE, state)

    def _state(
        self, cache: Any, batch: int, tokens: int, kwargs: dict[str, Any], dense: bool
    ) -> tuple[Sequences | None, bool]:
        if not self._keeps_state:
            return None, False
        cached = length(cache)
        known = getattr(cache, _ATTRIBUTE, None) if cached else None
        if not dense:
            return known, known is not None and known.step()
        if known is None or known.batch != batch:
            known = Sequences(self.policy, batch)
        valid = real_tokens(kwargs.get("attention_mask"), kwargs.get("position_ids"), batch, tokens, cached)
        known.begin(tokens, valid)
        return known, False


def _rows(args: Any, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Sequences and new tokens of each."""
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
    if given is None and args:
        given = args[0]
    if not isinstance(given, Tensor) or given.dim() < 2:
        return 1, 1
    return given.shape[0], given.shape[1]
