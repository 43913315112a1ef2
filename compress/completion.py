"""From a prompt to text, and what it took: the work behind `gossamer generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from ..errors import DataError, ModelError
from .generate import Sampling, Timing, generate
from .load import load
from .memory import PeakMemory, resident_bytes


@dataclass(frozen=True)
class Request:
    """What to write. `chat`: put the prompt through the tokenizer's chat template."""

    prompt: str
    max_new_tokens: int = 128
    chat: bool = False
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Completion:
    """The text and its cost. Bytes are anonymous plus shared resident memory."""

    text: str
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    repack_seconds: float
    first_token_seconds: float
    tokens_per_second: float
    loaded_bytes: int
    peak_bytes: int
    sparse_matrices: int
    dense_matrices: list[str]
    threads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def complete(model_id: str, request: Request, write: Callable[[str], None], **options: Any) -> Completion:
    """Load a model, write what follows the prompt piece by piece through `write`, and measure.

    `options` go to `gossamer.load`. DataError for a prompt without tokens or too long for the model, ModelError for a
    folder without tokenizer.
    """
    start = time.perf_counter()
    model = load(model_id, **options)
    load_seconds, loaded = time.perf_counter() - start, resident_bytes()
    tokenizer = _tokenizer(model_id, options)
    ids = _encode(tokenizer, request).to(model.device)
    streamer = _Pieces(tokenizer, write)
    timing, made = Timing(), []
    with PeakMemory() as memory:
        steps = generate(
            model, ids, request.max_new_tokens, sampling=request.sampling, stop=_stops(model, tokenizer), timing=timing
        )
        for token in steps:
            made.append(int(token))
            streamer.put(token.cpu())
        streamer.end()
    placed = model.gossamer_runtime
    return Completion(
        text=tokenizer.decode(made, skip_special_tokens=True),
        prompt_tokens=timing.prompt_tokens,
        new_tokens=len(made),
        load_seconds=load_seconds,
        repack_seconds=placed.seconds,
        first_token_seconds=timing.first_token_seconds,
        tokens_per_second=timing.tokens_per_second,
        loaded_bytes=loaded,
        peak_bytes=memory.peak,
        sparse_matrices=len(placed.sparse),
        dense_matrices=placed.dense,
        threads=torch.get_num_threads(),
    )


class _Pieces(TextStreamer):
    """transformers' streamer, which holds text back until its characters are complete, with our way of writing."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def _tokenizer(model_id: str, options: dict[str, Any]) -> Any:
    names = ("revision", "token", "trust_remote_code")
    given = {name: options[name] for name in names if options.get(name) is not None}
    try:
        return AutoTokenizer.from_pretrained(model_id, **given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{model_id} has no tokenizer that can be loaded: {reason}") from error


def _encode(tokenizer: Any, request: Request) -> torch.Tensor:
    if request.chat:
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template", hint="leave --chat out")
        message = [{"role": "user", "content": request.prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(request.prompt, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise DataError("the prompt has no tokens", hint="give a prompt of at least one character")
    return ids.long()


def _stops(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, by the generation settings or the tokenizer."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    said = tokenizer.eos_token_id if said is None else said
    return frozenset() if said is None else frozenset(said if isinstance(said, (list, tuple)) else [said])
