"""Training text as token rows, and the order in which a run sees them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .losses import IGNORED


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of tokens of one length.

    Attributes:
        ids: int64 [rows, length].
        labels: int64 [rows, length]: the ids, or -100 where nothing is to be learned (prompts, padding, the first token
            of every packed example). None: every token is a label.
        positions: int64 [rows, length], starting again at 0 at every packed example; then examples in one row do not
            see each other. None: one text runs through the row.
        name: what the user sees.
    """

    ids: Tensor
    labels: Tensor | None = None
    positions: Tensor | None = None
    name: str = "the training text"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def predicted(self) -> int:
        """Tokens that are predicted in one pass over all rows."""
        if self.labels is None:
            return len(self) * (self.length - 1)
        return int((self.labels[:, 1:] != IGNORED).sum())

    def row(self, index: int) -> dict[str, Tensor]:
        """What the model and the loss take of one row."""
        found = {"input_ids": self.ids[index], "labels": (self.ids if self.labels is None else self.labels)[index]}
        if self.positions is not None:
            found["position_ids"] = self.positions[index]
        return found

    def digest(self) -> str:
        """sha256 of everything in it."""
        total = hashlib.sha256(str(tuple(self.ids.shape)).encode())
        for part in (self.ids, self.labels, self.positions):
            if part is not None:
                total.update(part.contiguous().numpy().tobytes())
        return total.hexdigest()


def order(rows: int, count: int, seed: int) -> Tensor:
    """The first `count` row numbers of endless passes over `rows` rows, each pass in an order of its own, int64.

    A pure function: a resumed run, another number of processes and another batch size see the same sequence.
    ValueError for fewer than one row.
    """
    if rows < 1:
        raise ValueError(f"an order needs at least one row, got {rows}")
    parts: list[Tensor] = []
    found = 0
    while found < count:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + len(parts)) % 2**63)
        parts.append(torch.randperm(rows, generator=generator))
        found += rows
    return torch.cat(parts)[:count] if parts else torch.empty(0, dtype=torch.int64)


class Sequence(Dataset[dict[str, Tensor]]):
    """The rows in the order of the run, for a data loader that reads from front to back."""

    def __init__(self, rows: TokenRows, count: int, seed: int) -> None:
        self._rows = rows
        self._order = order(len(rows), count, seed).tolist()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._rows.row(self._order[index])
