"""What the processes of one training tell each other about positions. Alone, everything here is the identity."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import TrainingError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: Tensor) -> list[Tensor]:
    """The 1-D CPU tensors of all ranks, in order of rank; lengths may differ."""
    if world_size() == 1:
        return [tensor]
    device = _device()
    length = torch.tensor([len(tensor)], device=device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(one) for one in lengths)
    padded = torch.zeros(longest, dtype=tensor.dtype, device=device)
    padded[: len(tensor)] = tensor
    everyone = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded)
    return [one[: int(n)].cpu() for one, n in zip(everyone, lengths, strict=True)]


def average(tensor: Tensor) -> Tensor:
    """The mean over all ranks, summed in the order of the ranks so that everybody gets the same bits."""
    if world_size() == 1:
        return tensor
    parts = gather(tensor.detach().reshape(-1).cpu())
    return (sum(parts[1:], parts[0]) / len(parts)).view(tensor.shape).to(tensor.device)


def check_equal(tensors: list[Tensor], what: str) -> None:
    """TrainingError unless all ranks hold the same tensors bit for bit; compared by SHA-256.

    Every rank raises, so none of them is left waiting.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    parts = gather(torch.tensor(list(digest.digest()), dtype=torch.uint8))
    different = [rank for rank, part in enumerate(parts) if not torch.equal(part, parts[0])]
    if different:
        raise TrainingError(
            f"{what} differ between processes: rank {different[0]} disagrees with rank 0",
            hint="give every process the same seed, model and configuration; the last checkpoint is intact",
        )


def _device() -> torch.device:
    """Where the process group's collectives work."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
