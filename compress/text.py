"""Texts of a recipe as token windows: the tokenizer is loaded once, and only when some stage needs text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import DataError
from .data import Role, calibration_tokens, evaluation_windows, load_text, token_ids
from .evaluate import Protocol
from .overlap import Named, check_overlap
from .recipe import Recipe
from .traindata import TrainingText, load_training

if TYPE_CHECKING:
    from .blocks import StreamedModel
    from .data import TextData


@dataclass(frozen=True)
class TextSource:
    """What stays of a text when its windows are cut: `text` says how it was put together, `digest` is its sha256."""

    dataset: str
    text: str
    digest: str

    @property
    def name(self) -> str:
        return self.dataset


class Texts:
    """Calibration and evaluation windows of one recipe, and the check that they do not overlap."""

    def __init__(self, folder: Path, recipe: Recipe, model: StreamedModel) -> None:
        self.folder = folder
        self.recipe = recipe
        self.vocabulary = model.vocab_size
        self._tokenizer: Any = None
        self._read: dict[tuple[str, Role], TextData] = {}
        self._calibration: list[tuple[Named, Tensor]] = []
        self._evaluation: list[tuple[Named, Tensor]] = []

    def calibration(self, data: str, nsamples: int, seqlen: int) -> tuple[Tensor, TextSource]:
        """Windows [nsamples, seqlen], and what is known of the text that they are from."""
        text = self.text(data, "calibration")
        windows = calibration_tokens(self.tokenizer, text, nsamples, seqlen, self.recipe.seed)
        self.check_vocabulary(windows)
        self._calibration.append((text, windows))
        return windows, TextSource(text.name, text.protocol, text.digest)

    def training(self, data: str, length: int, heldout: float, tokens: int) -> TrainingText:
        """Rows of `length` tokens to train on and to hold out; of a large text no more than `tokens` need."""
        text = load_training(data, self.tokenizer, length, heldout=heldout, limit=tokens)
        for rows in (text.train.ids, text.heldout.ids):
            if len(rows):
                self.check_vocabulary(rows)
        self._calibration.append((text, text.train.ids))
        return text

    def evaluation(self, data: str, seqlen: int, limit: int | None, dtype: torch.dtype) -> tuple[Tensor, Protocol, str]:
        """(windows [n, seqlen], protocol, digest)."""
        text = self.text(data, "evaluation")
        ids = token_ids(self.tokenizer, text)
        limits = [count for count in (limit, text.window_limit) if count is not None]
        windows = evaluation_windows(ids, seqlen, min(limits, default=None), text.name)
        self.check_vocabulary(windows)
        self._evaluation.append((text, windows))
        bos = self._bos(ids)
        protocol = Protocol(
            dataset=text.name,
            text=text.protocol,
            seqlen=seqlen,
            windows=len(windows),
            predicted_tokens=len(windows) * (seqlen - 1),
            stride=seqlen,
            bos=bos,
            dtype=str(dtype).removeprefix("torch."),
        )
        return windows, protocol, text.digest

    def check_overlap(self) -> float | None:
        """Largest share of evaluation text found in calibration text; DataError above 1 % unless allowed."""
        shares = [
            check_overlap(evaluation, evaluation_ids, calibration, calibration_ids, allow=self.recipe.allow_overlap)
            for evaluation, evaluation_ids in self._evaluation
            for calibration, calibration_ids in self._calibration
        ]
        return max(shares, default=None)

    def calibrated(self, text: Named, ids: Tensor) -> None:
        """Remember that a stage read ids [n] of `text` by itself: evaluation text is compared with them, too."""
        self._calibration.append((text, ids))

    def text(self, data: str, role: Role) -> TextData:
        """The text that `data` names, read once."""
        if (data, role) not in self._read:
            self._read[data, role] = load_text(data, role)
        return self._read[data, role]

    def check_vocabulary(self, windows: Tensor) -> None:
        """DataError for token ids that the model has no embedding of."""
        if int(windows.max()) >= self.vocabulary:
            raise DataError(
                f"the tokenizer gives token {int(windows.max())}, the model has {self.vocabulary} embeddings",
                hint="tokenizer and model do not belong together",
            )

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer. DataError when there is none."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder)
        return self._tokenizer

    def _bos(self, ids: Tensor) -> str:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return "one at the start of the text" if bos is not None and int(ids[0]) == bos else "none"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in `folder`. DataError when it is missing or cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} has no usable tokenizer ({str(error).splitlines()[0]})",
            hint="copy the tokenizer files into the model folder; only `--method magnitude --no-eval` works without",
        ) from error
