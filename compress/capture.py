"""What the real model hands to each of its blocks, recorded in one pass of the real forward.

While recording, every block's `forward` is a stub that notes its arguments and passes the hidden state through, so
masks, rotary tables and positions are exactly the model's own, per block (sliding and full layers differ). Replaying
block i with its own record gives what `model.forward` gives, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


class Stop(Exception):
    """Ends a forward pass early; never leaves this package."""


@dataclass(frozen=True)
class Ref:
    """Stands for a recorded tensor: its place in the pool."""

    index: int


@dataclass(frozen=True)
class Hidden:
    """Stands for the hidden state."""


@dataclass(frozen=True)
class Spare:
    """Stands for a tensor beside the hidden state in a block's output."""


@dataclass(frozen=True)
class Returns:
    """How a block hands back its hidden state: a bare tensor, or element `place` of a tuple or list.

    `template`: None for a bare tensor; else all elements, with Spare where a tensor stood.
    """

    place: int = 0
    template: tuple[Any, ...] | None = None
    is_list: bool = False

    def unpack(self, output: Any) -> torch.Tensor:
        """The hidden state of a real block's output."""
        return output if self.template is None else output[self.place]

    def pack(self, hidden: torch.Tensor, spare: torch.Tensor) -> Any:
        """What a stub returns; `spare` stands where the block returns another tensor."""
        if self.template is None:
            return hidden
        items = [spare if isinstance(item, Spare) else item for item in self.template]
        items[self.place] = hidden
        return items if self.is_list else tuple(items)


@dataclass
class BlockArgs:
    """Recorded arguments of every block for every window; equal ones are stored once.

    `windows` [n, L]: the token ids. `pool`: distinct tensors (CPU). `calls`: distinct (args, kwargs) with Ref and
    Hidden in place of tensors. `index[block][window]`: which call (only windows that were captured).
    """

    windows: torch.Tensor
    pool: list[torch.Tensor] = field(default_factory=list)
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    index: list[dict[int, int]] = field(default_factory=list)
    returns: list[Returns] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.windows.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded tensors: constant in the number of windows unless arguments depend on the input."""
        return sum(t.numel() * t.element_size() for t in self.pool)

    def arguments(self, block: int, window: int, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of that call on the device of `hidden`."""
        args, kwargs = self.calls[self.index[block][window]]
        args, kwargs = _rebuild((args, kwargs), self.pool, hidden)
        return args, kwargs


class Recorder:
    """Collects the calls of one capture pass into a BlockArgs."""

    def __init__(self, windows: torch.Tensor, blocks: int) -> None:
        self.record = BlockArgs(windows, index=[{} for _ in range(blocks)])
        self._by_shape: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        self._seen: dict[int, tuple[torch.Tensor, int, int]] = {}
        self._window = 0

    def start(self, window: int) -> None:
        """Begin a window. Identities are forgotten: its tensors may reuse the addresses of the last one's."""
        self._window = window
        self._seen = {}

    def note(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> None:
        """Record one call."""
        call = self._strip((args, kwargs), hidden)
        try:
            place = self.record.calls.index(call)
        except ValueError:
            place = len(self.record.calls)
            self.record.calls.append(call)
        self.record.index[block][self._window] = place

    def replay(self, block: int, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's latest call, with `hidden` in place of the hidden state."""
        return self.record.arguments(block, self._window, hidden)

    def _strip(self, value: Any, hidden: torch.Tensor) -> Any:
        if value is hidden:
            return Hidden()
        if isinstance(value, torch.Tensor):
            return Ref(self._store(value))
        if isinstance(value, dict):
            return {key: self._strip(item, hidden) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._strip(item, hidden) for item in value)
        return value

    def _store(self, tensor: torch.Tensor) -> int:
        known = self._seen.get(id(tensor))
        if known is not None and known[1] == tensor._version:
            return known[2]
        copy = tensor.detach().to("cpu", copy=True)
        alike = self._by_shape.setdefault((copy.shape, copy.dtype), [])
        index = next((i for i in alike if torch.equal(self.record.pool[i], copy)), None)
        if index is None:
            index = len(self.record.pool)
            self.record.pool.append(copy)
            alike.append(index)
        self._seen[id(tensor)] = (tensor, tensor._version, index)
        return index


def _rebuild(value: Any, pool: Sequence[torch.Tensor], hidden: torch.Tensor) -> Any:
    if isinstance(value, Hidden):
        return hidden
    if isinstance(value, Ref):
        return pool[value.index].to(hidden.device)
    if isinstance(value, dict):
        return {key: _rebuild(item, pool, hidden) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rebuild(item, pool, hidden) for item in value)
    return value


def hidden_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state among a block's arguments: the first positional tensor, else `hidden_states`."""
    tried = [a for a in args[:1] if isinstance(a, torch.Tensor)]
    named = kwargs.get("hidden_states")
    if isinstance(named, torch.Tensor):
        tried.append(named)
    for tensor in tried:
        if tensor.dim() == 3 and tensor.is_floating_point():
            return tensor
    raise ModelError(
        f"{name} is called without a hidden state: looked for a [1, length, width] float tensor in the first "
        f"positional argument and in hidden_states=; got {len(args)} positional and {sorted(kwargs)}"
    )


def returns_of(name: str, output: Any, hidden: torch.Tensor) -> Returns:
    """Structure of a real block's output; ModelError when no element looks like the hidden state."""
    if isinstance(output, torch.Tensor):
        if output.shape == hidden.shape:
            return Returns()
    elif type(output) in (tuple, list):
        for place, item in enumerate(output):
            if isinstance(item, torch.Tensor) and item.shape == hidden.shape:
                template = tuple(Spare() if isinstance(other, torch.Tensor) else other for other in output)
                return Returns(place, template, isinstance(output, list))
    raise ModelError(f"{name} returns {type(output).__name__}: no hidden state of shape {tuple(hidden.shape)} in it")


@contextmanager
def stubbed(blocks: Sequence[nn.Module], stub: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Inside: calling block i calls `stub(i, args, kwargs)`. Attributes of the blocks (layer types) stay readable."""

    def make(i: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: stub(i, args, kwargs)

    for i, block in enumerate(blocks):
        block.__dict__["forward"] = make(i)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


class CaptureStub:
    """Stub of the capture pass: records block i's arguments, passes the hidden state through, ends at the last block.

    `returns(i, hidden)` says how the real block i hands its hidden state back. ModelError for a model that does
    anything else than calling its blocks once each, in order, each with what the one before returned.
    """

    def __init__(
        self,
        names: Sequence[str],
        recorder: Recorder,
        sink: Callable[[int, torch.Tensor], None],
        returns: Callable[[int, torch.Tensor], Returns],
    ) -> None:
        self._names = names
        self._recorder = recorder
        self._sink = sink
        self._returns = returns
        self.start(0)

    def start(self, window: int) -> None:
        """Begin a window."""
        self._window = window
        self._next = 0
        self._hidden: torch.Tensor | None = None
        self._spares: list[torch.Tensor] = []
        self._recorder.start(window)

    def __call__(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_of(self._names[i], args, kwargs)
        self._check(i, hidden, (args, kwargs))
        self._recorder.note(i, args, kwargs, hidden)
        if i == 0:
            self._sink(self._window, hidden.detach().to("cpu", copy=True))
        returns = self._returns(i, hidden)
        if i == len(self._names) - 1:
            raise Stop
        self._next, self._hidden = i + 1, hidden
        self._spares.append(hidden.new_empty(0))
        return returns.pack(hidden, self._spares[-1])

    def _check(self, i: int, hidden: torch.Tensor, arguments: Any) -> None:
        name = self._names[i]
        if i != self._next:
            raise ModelError(
                f"the model calls {name} where {self._names[self._next]} was expected: blocks that are skipped, "
                "repeated or reordered cannot be streamed"
            )
        before = self._hidden
        if before is not None and before is not hidden and not torch.equal(before, hidden):
            raise ModelError(f"the model changes the hidden state before {name}: it cannot be streamed block by block")
        if any(leaf is spare for leaf in _leaves(arguments) for spare in self._spares):
            raise ModelError(f"{name} reads another block's second output: it cannot be streamed block by block")


def injecting_stub(
    names: Sequence[str], returns: Sequence[Returns], hidden: torch.Tensor
) -> Callable[[int, tuple[Any, ...], dict[str, Any]], Any]:
    """Stub that makes the last block return `hidden`."""

    def stub(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passed = hidden if i == len(names) - 1 else hidden_of(names[i], args, kwargs)
        return returns[i].pack(passed, passed.new_empty(0))

    return stub


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
