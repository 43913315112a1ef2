"""What one process of `test_flow_sharded.py` does: N:M flow on a model sharded by FSDP2, in a plain loop."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from gossamer.compress.distributed import leave
from gossamer.finetune.sharded import remember, restore
from gossamer.pruning.flow import Flow, FlowMatrix, FlowOptions
from gossamer.pruning.pattern import NM

STEPS = 9


class Swapped(nn.Module):
    """y = x W with W [in, out], as GPT-2 stores its matrices."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def train(kind: str, tail: float, whole_again: bool = False) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(digest of every mask, whole weights) after STEPS steps on eight rows each, split over the processes.

    `whole_again`: the sharding is undone before the flow ends.
    """
    torch.manual_seed(0)
    # 5 outputs and 12 inputs over two processes: uneven shards
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), Swapped(12, 8), nn.Tanh(), nn.Linear(8, 5))
    data = [(torch.randn(8, 8), torch.randn(8, 5)) for _ in range(STEPS)]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    matrices = {
        "a": FlowMatrix(model[0], NM(2, 4)),
        "b": FlowMatrix(model[2], NM(1, 4), transposed=True),
        "c": FlowMatrix(model[4], NM(1, 8)),
    }
    flow = Flow(matrices, FlowOptions(kind, STEPS, tail=tail, shrink=0.5))
    before = remember(model)
    if world > 1:
        for module in (model[0], model[2], model[4], model):
            fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)
    flow.watch(optimizer)
    for step, (x, y) in enumerate(data):
        flow.at(step)
        optimizer.zero_grad()
        mse_loss(model(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
    if whole_again:
        restore(before)
    masks = flow.finish()
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}
    return {name: mask.sha256() for name, mask in masks.items()}, whole


def child(folder: str, kind: str, tail: float, whole_again: bool) -> Any:
    """In a process of its own, named by RANK: what `train` gives as files below `folder`."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    digests, whole = train(kind, tail, whole_again)
    dist.barrier()
    leave()
    torch.save(whole, Path(folder) / f"{rank}.pt")
    digests["weights"] = hashlib.sha256(b"".join(w.numpy().tobytes() for w in whole.values())).hexdigest()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(digests))
    raise SystemExit(0)
