"""Several processes as one: the few collective operations of calibration and evaluation, no-ops in a single process.

Launched by `accelerate launch` or torchrun, the process group comes from accelerate. Windows are dealt to the ranks in
turns; every statistic is added up in the order of the windows, each entry by one rank, and each matrix is solved by one
rank. So the result does not depend on the number of processes, to the last bit.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GossamerError, ResourceError

T = TypeVar("T")
_SHARED = "raised_on_every_rank"


def start(device: str) -> None:
    """Join the process group when launched with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")
        atexit.register(leave)


def leave() -> None:
    """Leave the process group, if there is one. No wrapped model (DDP) may be in use any more.

    A process that ends inside a group is aborted by its own network threads, and its exit code is lost. And one whose
    wrapped model outlives the group waits for ever: as the group's last holder, DDP joins those threads while it holds
    the interpreter's lock, which they need to free their last tensors (PyTorch issue 56297). So models that nothing
    but a cycle still holds go first.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


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


# ---- windows and what was measured in them ---------------------------------------------------------------------------


def my_share(count: int) -> range:
    """Every world()-th of `count` windows: the ones that belong to this rank. May be empty."""
    return range(rank(), count, world())


def followed(count: int) -> list[int]:
    """The windows that this rank runs through the blocks: its own, and the first, which shows the structure to all."""
    return sorted({0, *my_share(count)})


def turns(count: int) -> Iterator[int | None]:
    """This rank's window in every turn; None in a last turn that has too few."""
    for first in range(0, count, world()):
        yield first + rank() if first + rank() < count else None


def in_turn(tensors: Mapping[str, Tensor] | None, device: torch.device) -> Iterator[Mapping[str, Tensor]]:
    """What the ranks measured in one turn, in the order of the windows, on every rank. None: this rank had no window.

    Tensors arrive bit for bit, one window at a time.
    """
    if world() == 1:
        if tensors is not None:
            yield tensors
        return
    mine = None if tensors is None else {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for owner, layout in enumerate(from_all(mine)):
        if layout is None:
            continue
        here = tensors if owner == rank() and tensors is not None else None
        found = {}
        for name, (shape, dtype) in layout.items():
            tensor = torch.empty(shape, dtype=dtype, device=device) if here is None else here[name].contiguous()
            if tensor.numel():
                dist.broadcast(tensor.view(-1).view(torch.uint8), owner)
            found[name] = tensor
        yield found


def owner_of(slab: int) -> int:
    """The rank that adds up slab number `slab` of a matrix: there and back again, since later slabs are longer."""
    place = slab % (2 * world())
    return min(place, 2 * world() - 1 - place)


def sum_(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place. Exact where all ranks but one hold zeros."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(values: Sequence[float]) -> list[float]:
    """The values of all ranks, one after another."""
    return [value for part in from_all(list(values)) for value in part]


def broadcast_(tensors: Sequence[Tensor], source: int) -> None:
    """Send tensors from rank `source` to all others, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, source)


def from_rank(value: T, source: int) -> T:
    """The value that rank `source` passed; it must pickle."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """The values of all ranks; they must pickle."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


# ---- each for itself -------------------------------------------------------------------------------------------------


@contextmanager
def alone() -> Iterator[None]:
    """Inside, accelerate and the Trainer see one process: every rank trains a model of its own. No collectives inside.

    The process group stays; only what accelerate knows of it is set aside.
    """
    if world() == 1:
        yield
        return
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (PartialState, AcceleratorState, GradientState)
    known = [dict(state._shared_state) for state in states]
    environment = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")}
    for state in states:
        state._shared_state.clear()
    for name in environment:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for state, facts in zip(states, known, strict=True):
            state._shared_state.clear()
            state._shared_state.update(facts)
        os.environ.update({name: value for name, value in environment.items() if value is not None})


def sharded() -> bool:
    """Whether accelerate was asked to cut models into pieces (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


# ---- failing together ------------------------------------------------------------------------------------------------


@contextmanager
def agreed() -> Iterator[None]:
    """A failure of one rank inside is raised on every rank, so that none waits for it. No collectives inside."""
    failure: GossamerError | OSError | None = None
    try:
        yield
    except (GossamerError, OSError) as error:
        if world() == 1:
            raise
        failure = error
    failures = from_all(failure)
    if any(failures):
        first = next(error for error in failures if error is not None)
        first.__dict__[_SHARED] = True
        raise first


@contextmanager
def shared(kind: type[GossamerError]) -> Iterator[None]:
    """Failures of this kind inside are those of every rank, found together: only rank 0 will tell them."""
    try:
        yield
    except kind as error:
        error.__dict__[_SHARED] = True
        raise


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0; its value, or its failure, on every rank."""
    value: Any = None
    with agreed():
        if is_main():
            value = work()
    return from_rank(value, 0)


@contextmanager
def one_run() -> Iterator[None]:
    """What a failure of one process looks like in a run of several.

    A failure that is not `agreed` is marked `alone`: rank 0 will not tell it. When another process has ended, a
    ResourceError rather than a traceback from the network.
    """
    try:
        yield
    except GossamerError as error:
        error.alone = world() > 1 and not any(_SHARED in vars(e) for e in (error, error.__cause__) if e is not None)
        raise
    except RuntimeError as error:
        if world() == 1 or not _is_lost_peer(error):
            raise
        lost = ResourceError(
            f"process {rank()} lost the others: one of the {world()} processes has ended",
            hint="its own message says why; none means it was killed, for lack of memory perhaps; "
            "repeat the command with --resume",
        )
        lost.alone = True
        raise lost from error


def _is_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)
