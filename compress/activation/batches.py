"""Which windows of a walk run through a block together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import distributed
from ..blocks import BlockArgs, StreamedModel
from ..hidden import HiddenStore

TOGETHER = 1 << 22  # numbers in the hidden states of windows that run together


class Batches:
    """Followed windows in groups small enough to run together; the first one, shown to every rank, is alone."""

    def __init__(self, model: StreamedModel, args: BlockArgs, windows: int) -> None:
        self._model, self._args = model, args
        followed = distributed.followed(windows)
        count = max(1, TOGETHER // (args.length * model.config.get_text_config().hidden_size))
        first, rest = followed[:1], followed[1:]
        self._groups = [first, *(rest[i : i + count] for i in range(0, len(rest), count))]
        self._alike: dict[int, bool] = {}

    def of(self, index: int, block: nn.Module, hidden: HiddenStore) -> Sequence[Sequence[int]]:
        """The groups if this block gives every window of a batch what it gives it alone, else one by one."""
        if index not in self._alike:
            self._alike[index] = self._check_alike(index, block, hidden)
        if self._alike[index]:
            return self._groups
        return [[window] for group in self._groups for window in group]

    def _check_alike(self, index: int, block: nn.Module, hidden: HiddenStore) -> bool:
        large = max(self._groups, key=len)
        if len(large) < 2 or len({self._args.index[index][window] for group in self._groups for window in group}) > 1:
            return False
        pair = large[:2]
        try:
            both = self._model.run_block(index, block, torch.cat([hidden.get(w) for w in pair]), self._args, pair[0])
        except (RuntimeError, ValueError):
            return False
        for row, window in zip(both, pair, strict=True):
            alone = self._model.run_block(index, block, hidden.get(window), self._args, window)[0]
            if not torch.allclose(row.float(), alone.float(), rtol=1e-3, atol=1e-3 * float(alone.float().std())):
                return False
        return True
