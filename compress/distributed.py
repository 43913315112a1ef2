"""The few collective operations of data-parallel calibration and evaluation; all of them no-ops in a single process.

Launched by `accelerate launch` or torchrun, the process group comes from accelerate. Windows are split over the ranks,
statistics are summed, each matrix is solved by one rank and sent to the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str) -> None:
    """Join the process group when launched with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process."""
    if world() > 1:
        dist.barrier()


def my_share(count: int) -> range:
    """The contiguous share of `count` items that belongs to this rank."""
    size, extra = divmod(count, world())
    start = rank() * size + min(rank(), extra)
    return range(start, start + size + (rank() < extra))


def sum_(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate [n_r, d] tensors of all ranks in rank order (n_r may differ)."""
    if world() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world())]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device))
    longest = max(int(count) for count in counts)
    padded = rows.new_zeros(longest, rows.shape[1])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def broadcast_(tensors: Sequence[Tensor], source: int) -> None:
    """Send tensors from rank `source` to all others, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, source)


def same_everywhere(text: str) -> bool:
    """Whether every rank passed the same text."""
    if world() == 1:
        return True
    texts: list[str | None] = [None] * world()
    dist.all_gather_object(texts, text)
    return all(other == text for other in texts)


def from_main(value: object) -> object:
    """The value that rank 0 passed."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
