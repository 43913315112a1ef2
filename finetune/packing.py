"""Examples packed into one row, for models that keep them apart by their positions, and one per row for the others.

Positions that begin again at 0 make most models of transformers mask the examples from each other. Models without
rotary or learned positions of their own (ALiBi, recurrent ones) and some older ones take no notice; no flag says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .losses import IGNORED
from .tokens import TokenRows

_PROBE = 8  # tokens of each of two examples
_NOTHING = 1e-4  # of the largest logit: rounding


@torch.no_grad()
def sees_neighbours(model: Any, length: int) -> bool:
    """Whether what the model says about an example depends on the one before it in the row of at most `length` tokens.

    Found out with two short rows that differ in their first example only.
    """
    half = min(_PROBE, length // 2)
    device = next(model.parameters()).device
    tokens = int(model.get_input_embeddings().num_embeddings)
    ids = torch.randint(tokens, (2, 2 * half), generator=torch.Generator().manual_seed(0))
    ids[1, half:] = ids[0, half:]
    positions = torch.arange(half).repeat(2)[None].to(device)
    was_training = model.training
    model.eval()
    first, second = (
        model(input_ids=row[None].to(device), position_ids=positions, use_cache=False).logits[:, half:].float()
        for row in ids
    )
    model.train(was_training)
    return bool((first - second).abs().max() > _NOTHING * first.abs().max())


def apart(model: Any, rows: TokenRows) -> TokenRows:
    """`rows` themselves, or with one example in a row where the model would see its neighbours."""
    if rows.positions is None or len(rows) == 0 or rows.length < 2 or not sees_neighbours(model, rows.length):
        return rows
    return one_per_row(rows)


def one_per_row(rows: TokenRows) -> TokenRows:
    """Packed examples in their order, each at the beginning of a row of its own; what is behind it is no label."""
    assert rows.positions is not None
    assert rows.labels is not None
    found: list[tuple[Tensor, Tensor]] = []
    for ids, labels, positions in zip(rows.ids, rows.labels, rows.positions, strict=True):
        edges = [*(positions == 0).nonzero().flatten().tolist(), rows.length]
        for start, stop in zip(edges, edges[1:], strict=False):
            if bool((labels[start:stop] != IGNORED).any()):  # not what is left of the row
                found.append((ids[start:stop], labels[start:stop]))
    made = rows.ids.new_zeros(len(found), rows.length)
    learned = torch.full_like(made, IGNORED)
    for row, (ids, labels) in enumerate(found):
        made[row, : len(ids)], learned[row, : len(ids)] = ids, labels
    return TokenRows(made, learned, name=rows.name)
