"""Text in, token windows out.

A DATA argument is a file or folder (`textfile`), a short name with its published protocol, or a dataset id (`hubdata`).
Whatever it is, the text is tokenised in one go, with the tokenizer's own special tokens: at most one BOS, at the start.
Calibration takes windows at random offsets; evaluation takes non-overlapping windows from the start and drops the tail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from .textdata import Role, TextData
from .textfile import looks_like_path, read_path

__all__ = [
    "Role",
    "TextData",
    "calibration_tokens",
    "calibration_windows",
    "evaluation_windows",
    "load_text",
    "token_ids",
]

_DRAWS_PER_WINDOW = 200


def load_text(spec: str, role: Role) -> TextData:
    """The text that `spec` names: a path, a short name (wikitext2, c4, ptb) or `id[:config][:split][:column]`.

    An existing path wins over a dataset of the same name. Raises DataError when nothing readable is there; offline, its
    hint says which file to give.
    """
    path = Path(spec).expanduser()
    if spec and path.exists():
        return read_path(path)
    if not spec or looks_like_path(spec):
        raise DataError(
            f"{spec or 'a text without a name'} does not exist", hint="give a text, JSONL or Parquet file or a folder"
        )
    from .hubdata import load_hub_text

    return load_hub_text(spec, role)


def token_ids(tokenizer: Any, text: TextData) -> Tensor:
    """Token ids [n], int64, of the whole text in one go. No warning about length: windows are cut afterwards."""
    ids = tokenizer(text.text, return_attention_mask=False, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"{text.name} gives no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def calibration_windows(
    ids: Tensor, nsamples: int, seqlen: int, seed: int, name: str = "the calibration text"
) -> Tensor:
    """Windows [nsamples, seqlen] of ids [n] at random offsets, one in each of nsamples equal parts of 0..n-seqlen.

    Parts (stratified sampling) cover the text more evenly than free draws, so that seeds differ less. The generator is
    its own. Windows may overlap each other. Raises DataError when the text is shorter than one window.
    """
    _enough(len(ids), seqlen, name)
    generator = torch.Generator().manual_seed(seed)
    places = len(ids) - seqlen + 1
    drawn = torch.rand(nsamples, generator=generator, dtype=torch.float64)
    starts = ((torch.arange(nsamples) + drawn) * places / nsamples).long().clamp_(max=places - 1)
    return torch.stack([ids[start : start + seqlen] for start in starts.tolist()])


def calibration_tokens(tokenizer: Any, text: TextData, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Calibration windows [nsamples, seqlen] of any text; a text of separate documents gives one window per document.

    The document protocol (C4): draw documents at random, skip those of at most `seqlen` tokens, cut one random window.
    """
    if text.documents is None:
        return calibration_windows(token_ids(tokenizer, text), nsamples, seqlen, seed, text.name)
    generator = torch.Generator().manual_seed(seed)
    windows: list[Tensor] = []
    longest = 0
    for _ in range(_DRAWS_PER_WINDOW * nsamples):
        pick = int(torch.randint(0, len(text.documents), (1,), generator=generator))
        ids = tokenizer(text.documents[pick], return_attention_mask=False, verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) > seqlen:
            start = int(torch.randint(0, len(ids) - seqlen, (1,), generator=generator))
            windows.append(torch.tensor(ids[start : start + seqlen], dtype=torch.int64))
        if len(windows) == nsamples:
            return torch.stack(windows)
    raise DataError(
        f"{text.name} has too few documents of more than {seqlen} tokens: {len(windows)} of {nsamples} windows found, "
        f"the longest document seen has {longest} tokens",
        hint="use a shorter --seqlen, fewer --nsamples, or another --calibration",
    )


def evaluation_windows(ids: Tensor, seqlen: int, limit: int | None = None, name: str = "the evaluation text") -> Tensor:
    """The first `limit` (all, when None) non-overlapping windows [n, seqlen] of ids [tokens]; the tail is dropped.

    Raises DataError when the text is shorter than one window.
    """
    _enough(len(ids), seqlen, name)
    count = len(ids) // seqlen
    count = count if limit is None else min(count, limit)
    return ids[: count * seqlen].reshape(count, seqlen)


def _enough(tokens: int, seqlen: int, name: str) -> None:
    if tokens < seqlen:
        raise DataError(
            f"{name} gives {tokens} tokens, one window needs {seqlen}",
            hint="give more text, or ask for shorter windows: a smaller --seqlen, shorter --lengths of a head plan",
        )
