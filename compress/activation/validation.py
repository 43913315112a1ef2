"""Calibration and validation windows of one text that share no token: from two parts of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ..data import calibration_tokens, calibration_windows, evaluation_windows, token_ids
from ..text import Texts, TextSource
from ..textdata import TextData


def two_parts(texts: Texts, data: str, windows: int, validation: int, seqlen: int) -> tuple[Tensor, Tensor, TextSource]:
    """(calibration [windows, seqlen], validation [validation, seqlen], what is known of the text).

    Calibration windows lie at random in the first half of the tokens; validation windows, which do not overlap, lie
    evenly in the second, which is the larger one where the text is short. Of a text of documents, the first half gives
    calibration windows, and every validation window is from another document. DataError for a text too short for it.
    """
    text = texts.text(data, "calibration")
    cut = _of_tokens if text.documents is None else _of_documents
    first, second = cut(texts, text, windows, validation, seqlen)
    for part in (first, second):
        texts.check_vocabulary(part)
        texts.calibrated(text, part)
    return first, second, TextSource(text.name, text.protocol, text.digest)


def _of_tokens(texts: Texts, text: TextData, windows: int, validation: int, seqlen: int) -> tuple[Tensor, Tensor]:
    ids = token_ids(texts.tokenizer, text)
    least = (1 + validation) * seqlen
    if len(ids) < least:
        raise DataError(
            f"{text.name} gives {len(ids)} tokens; {validation} windows of {seqlen} tokens to measure the perplexity "
            f"on, and as many tokens as one window to calibrate on, need {least}",
            hint="give more text (--calibration), or a smaller --nsamples or --seqlen",
        )
    cut = min(len(ids) // 2, len(ids) - validation * seqlen)
    first = calibration_windows(ids[:cut], windows, seqlen, texts.recipe.seed, text.name)
    every = evaluation_windows(ids[cut:], seqlen, name=text.name)
    return first, every[torch.arange(validation) * len(every) // validation]


def _of_documents(texts: Texts, text: TextData, windows: int, validation: int, seqlen: int) -> tuple[Tensor, Tensor]:
    assert text.documents is not None
    count, seed = len(text.documents), texts.recipe.seed
    half = count // 2
    if not half or count - half < validation:
        raise DataError(
            f"{text.name} has {count} documents; {validation} windows to measure the perplexity on are from one each, "
            f"and half of the documents are calibrated on",
            hint="give more text (--calibration), or a smaller --nsamples",
        )
    ends = [half + (count - half) * k // validation for k in range(validation + 1)]
    drawn = [_windows(texts, text, *part, 1, seqlen, seed) for part in zip(ends, ends[1:], strict=False)]
    return _windows(texts, text, 0, half, windows, seqlen, seed), torch.cat(drawn)


def _windows(texts: Texts, text: TextData, start: int, stop: int, count: int, seqlen: int, seed: int) -> Tensor:
    assert text.documents is not None
    part = TextData("", text.name, text.protocol, documents=_Part(text.documents, start, stop))
    return calibration_tokens(texts.tokenizer, part, count, seqlen, seed)


class _Part(Sequence[str]):
    """Some documents of a text, which may lie on disk."""

    def __init__(self, documents: Sequence[str], start: int, stop: int) -> None:
        self._documents, self._places = documents, range(start, stop)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._documents[self._places[index]]

    def __iter__(self) -> Iterator[str]:
        return (self._documents[place] for place in self._places)
