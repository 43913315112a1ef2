"""What the new tokens of a call are: a prompt, or decoded ones.

One token with a filled cache is decoded, several are a prompt or a piece of one. Where that is not so, whoever makes
the call says so: candidates of speculative decoding are several decoded tokens (`speculative`), and the last piece of a
prompt may be one token. transformers' `generate` says both (`watch_generate`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType
from typing import Any

_ATTRIBUTE = "_gossamer_candidates"
_said: ContextVar[bool | None] = ContextVar("prompt", default=None)


@contextmanager
def speculative() -> Iterator[None]:
    """Inside the block, tokens of this thread that meet a filled cache are decoded, however many a call has."""
    with _saying(False):
        yield


def is_prompt(cache: Any, tokens: int) -> bool:
    """Whether a call of `tokens` new tokens per sequence is (a piece of) a prompt. Ask once per call."""
    candidates: _Candidates | None = getattr(cache, _ATTRIBUTE, None)
    checking = candidates is not None and candidates.checking()
    if length(cache) == 0:
        return True
    said = _said.get()
    if said is not None:
        return said
    return tokens > 1 and not checking


def length(cache: Any) -> int:
    """Tokens that a cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def watch_generate(model: Any) -> None:
    """Make `model.generate` say which of its calls are prompts in pieces, and which check candidates."""
    kind = type(model)
    if hasattr(kind, "_prefill"):
        model._prefill = MethodType(_prefill, model)
    if hasattr(kind, "_get_candidate_generator"):
        model._get_candidate_generator = MethodType(_get_candidate_generator, model)


def _prefill(model: Any, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    # An assistant is given the accepted tokens anew by each of its many `generate`: they were decoded.
    decoded, pieces = generation_config.is_assistant, generation_config.prefill_chunk_size is not None
    with _saying(False if decoded else True if pieces else None):
        return type(model)._prefill(model, input_ids, generation_config, *args, **kwargs)


def _get_candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    made = type(model)._get_candidate_generator(model, *args, **kwargs)
    cache = kwargs.get("model_kwargs", {}).get("past_key_values")
    if cache is not None:
        setattr(cache, _ATTRIBUTE, _Candidates(made))
    return made


class _Candidates:
    """On the cache of a run that checks candidates; over when what makes them is gone. Its first call is the prompt."""

    def __init__(self, source: Any) -> None:
        self._source = weakref.ref(source)
        self._begun = False

    def checking(self) -> bool:
        begun, self._begun = self._begun, True
        return begun and self._source() is not None


@contextmanager
def _saying(prompt: bool | None) -> Iterator[None]:
    token = _said.set(prompt)
    try:
        yield
    finally:
        _said.reset(token)
