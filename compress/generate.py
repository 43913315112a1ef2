"""The decode loop: tokens one by one, with what they cost.

transformers' own `generate` spends several milliseconds of Python per token, as much as a sparse model of a billion
weights needs for its arithmetic. This loop does what is needed and nothing else: one forward pass over the prompt, then
one per token, with the keys and values in memory that is made once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ..attention.filled import FilledCache
from ..errors import DataError, RecipeError
from .heads import new_cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else drawn from softmax(logits / temperature)

    restricted to the `top_k` most likely (0: all) and then to the smallest set whose probability reaches `top_p`.
    RecipeError for values outside their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise RecipeError(
                f"temperature {self.temperature:g}, top-k {self.top_k}, top-p {self.top_p:g}",
                hint="temperature and top-k must not be negative, top-p lies in (0, 1]",
            )

    def chooser(self, device: torch.device) -> Chooser:
        return Chooser(self, torch.Generator(device).manual_seed(self.seed))


@dataclass
class Chooser:
    """One sequence of draws."""

    how: Sampling
    generator: torch.Generator

    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids [batch] of logits [batch, vocabulary]."""
        if self.how.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.how.temperature
        if 0 < self.how.top_k < logits.shape[-1]:
            least = logits.topk(self.how.top_k).values[:, -1:]
            higher, equal = logits > least, logits == least
            first = equal.cumsum(-1) <= self.how.top_k - higher.sum(-1, keepdim=True)  # of equals as argmax has it
            logits = logits.masked_fill(~(higher | (equal & first)), float("-inf"))
        if self.how.top_p < 1:
            ordered, order = logits.sort(descending=True)
            chances = ordered.softmax(-1)
            beyond = chances.cumsum(-1) - chances >= self.how.top_p
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(1)


@dataclass
class Timing:
    """Seconds of every token; the first one comes from the prompt's own pass."""

    prompt_tokens: int = 0
    steps: list[float] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        return self.steps[0] if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence, over the tokens after the first."""
        rest = sum(self.steps[1:])
        return (len(self.steps) - 1) / rest if rest > 0 else 0.0


@torch.no_grad()  # as a decorator: only while a token is computed, never in the loop that takes the tokens
def generate(
    model: Any,
    ids: Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop: frozenset[int] = frozenset(),
    timing: Timing | None = None,
) -> Iterator[Tensor]:
    """Token ids [batch], step by step, after the prompts `ids` [batch, length], all of one length.

    Stops after `max_new_tokens`, or when every sequence has given a token of `stop`; a sequence that has given one goes
    on with it. DataError for an empty prompt and for more tokens than the model has positions.
    """
    timing = Timing() if timing is None else timing
    batch, length = ids.shape
    _check_length(model, length, max_new_tokens)
    timing.prompt_tokens = length
    choose = (sampling or Sampling()).chooser(ids.device)
    ends = torch.tensor(sorted(stop), device=ids.device)
    done = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    last = ids[:, -1]
    start = time.perf_counter()
    cache = _cache(model, length + max_new_tokens)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    for step in range(max_new_tokens):
        token = choose(logits[:, -1])
        last = token = torch.where(done, last, token)
        timing.steps.append(time.perf_counter() - start)
        yield token
        start = time.perf_counter()
        if ends.numel():
            done |= torch.isin(token, ends)
            if bool(done.all()):
                return
        if step + 1 < max_new_tokens:
            logits = model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits


def _check_length(model: Any, length: int, new: int) -> None:
    if length < 1 or new < 1:
        raise DataError(f"a prompt of {length} tokens and {new} new ones; both must be at least 1")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length + new > limit:
        raise DataError(
            f"a prompt of {length} tokens and {new} new ones, the model has {limit} positions",
            hint=f"ask for at most {max(limit - length, 0)} new tokens, or shorten the prompt",
        )


def _cache(model: Any, length: int) -> Any:
    """Keys and values for `length` positions, made once; None, transformers' choice, where a model has another kind.

    Of a model with a head plan, only what the plan keeps; of layers with a window, the window.
    """
    ragged = new_cache(model, length)
    if ragged is not None:
        return ragged
    try:
        usual = DynamicCache(config=model.config).layers
        kinds = {type(layer) for layer in usual}
        if kinds == {DynamicLayer}:
            return FilledCache(len(usual), length)
        return StaticCache(config=model.config, max_cache_len=length)
    except (TypeError, ValueError, AttributeError):
        return None
