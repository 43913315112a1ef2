"""Candidates of a soup on disk and in several processes: their mean, and their losses on held-out text.

Every process trains candidates of its own, in turns; under FSDP a candidate lies in pieces on all processes, which
train one after the other together. A mean is added up one candidate at a time in the processes that own them, and then
over the processes by all_reduce, so no process ever holds more than two models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError
from ..finetune.losses import IGNORED
from ..finetune.tokens import TokenRows
from ..pruning.mean import Mean, average
from . import distributed

Load = Callable[[], Mapping[str, Tensor]]


def teams() -> int:
    """How many candidates are trained at the same time: one per process, or one by all of them (FSDP)."""
    return 1 if distributed.sharded() else distributed.world()


def owner_of(candidate: int) -> int:
    """The process that holds candidate number `candidate`, from 0, and trains it unless all of them do."""
    return candidate % teams()


def trains(candidate: int) -> bool:
    """Whether this process takes part in training it."""
    return distributed.sharded() or owner_of(candidate) == distributed.rank()


def apart() -> AbstractContextManager[None]:
    """Around the training of candidates: a failure of one process becomes that of all, where they train apart."""
    return nullcontext() if distributed.sharded() else distributed.agreed()


def own_run() -> AbstractContextManager[None]:
    """Around the training of one candidate: one process, or one team of all."""
    return nullcontext() if distributed.sharded() else distributed.alone()


def mixed(load: Sequence[Load], weights: Sequence[float], device: torch.device) -> dict[str, Tensor]:
    """The mean of the candidates with these weights (sum 1), on every process, on `device`.

    load[i]: the tensors of candidate i; called by the process that owns it alone. CheckpointError as `Mean.add`.
    """
    if distributed.world() == 1:
        return average(load, weights)
    mean = Mean()
    share = 0.0
    with distributed.agreed():
        for index, weight in enumerate(weights):
            if weight and owner_of(index) == distributed.rank():
                mean.add(load[index](), weight, f"candidate {index + 1}")
                share += weight
    own = mean.result() if share else {}
    layouts = distributed.from_all({name: (tuple(t.shape), t.dtype) for name, t in own.items()})
    holders = [rank for rank, layout in enumerate(layouts) if layout]
    first = layouts[holders[0]]
    for rank in holders[1:]:
        if layouts[rank] != first:
            raise CheckpointError("candidates of different processes do not have the same tensors")
    return {
        name: _summed(own.get(name), share, shape, dtype, holders, device) for name, (shape, dtype) in first.items()
    }


def _summed(
    own: Tensor | None,
    share: float,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    holders: list[int],
    device: torch.device,
) -> Tensor:
    if dtype.is_floating_point:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        part = torch.zeros(shape, dtype=wide, device=device) if own is None else own.to(device, wide) * share
        return distributed.sum_(part.contiguous()).to(dtype)
    value = torch.zeros(shape, dtype=dtype, device=device) if own is None else own.to(device).contiguous()
    theirs = value.clone()
    distributed.broadcast_([theirs], holders[0])
    with distributed.agreed():
        if own is not None and not torch.equal(value, theirs):
            raise CheckpointError("whole numbers of candidates differ: they cannot be averaged")
    return theirs


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, rows: TokenRows, batch: int) -> Tensor:
    """log p of every token given those before it, float32 [rows, length - 1]; 0 where there is no label."""
    device = next(model.parameters()).device
    model.eval()
    found = []
    for start in range(0, len(rows), batch):
        items = [rows.row(index) for index in range(start, min(start + batch, len(rows)))]
        inputs = {key: torch.stack([item[key] for item in items]).to(device) for key in items[0]}
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        found.append(-losses.cpu())
    return torch.cat(found) if found else torch.zeros(0, max(rows.length - 1, 0))


def labelled(rows: TokenRows) -> Tensor:
    """Number of predicted tokens of each row, at least 1, int64 [rows]."""
    labels = rows.ids if rows.labels is None else rows.labels
    return (labels[:, 1:] != IGNORED).sum(1).clamp_min(1)


def per_row(log_p: Tensor, rows: TokenRows) -> Tensor:
    """Mean loss of each row, float64 [rows]."""
    return -log_p.double().sum(1) / labelled(rows)


def ensemble_per_row(log_ps: Sequence[Tensor], rows: TokenRows) -> Tensor:
    """The same for the prediction ensemble. Where there is no label, all log p are 0 and so is that of the mean."""
    from ..pruning.soup import ensemble_losses

    return per_row(-ensemble_losses(torch.stack(list(log_ps))), rows)


def slopes(model: torch.nn.Module, load: Sequence[Load], rows: TokenRows, batch: int) -> tuple[float, list[float]]:
    """(mean loss per token of `model` on `rows`, its slope towards every candidate): <dL / d theta, theta_i>."""
    device = next(model.parameters()).device
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    total = float(labelled(rows).sum())
    loss = 0.0
    with torch.enable_grad():
        for start in range(0, len(rows), batch):
            items = [rows.row(index) for index in range(start, min(start + batch, len(rows)))]
            inputs = {key: torch.stack([item[key] for item in items]).to(device) for key in items[0]}
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            part = functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
            ) / total  # fmt: skip
            part.backward()
            loss += float(part.detach())
    found = [0.0] * len(load)
    for index, candidate in enumerate(load):
        if owner_of(index) == distributed.rank():
            tensors = candidate()
            found[index] = sum(
                float((p.grad.double() * tensors[name].to(device).double()).sum())
                for name, p in parameters.items()
                if p.grad is not None
            )
    model.zero_grad(set_to_none=True)
    every = distributed.from_all((loss, found))
    return every[0][0], [every[owner_of(index)][1][index] for index in range(len(load))]
