"""Seeing the inputs of a block's matrices while it runs, and which matrices share one input."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from .capture import Stop
from .experts import tapped
from .prunable import Prunable, owner_of

Group = list[Prunable]  # matrices that multiply one and the same input
Step = list[Group]  # groups that do not wait for each other
See = Callable[[Prunable, torch.Tensor], None]


@contextmanager
def seeing(block: nn.Module, path: str, prunables: Iterable[Prunable], see: See) -> Iterator[None]:
    """Inside: `see(prunable, input)` runs before every use of a listed matrix (input as the module gets it)."""
    fused: dict[str, dict[tuple[str, int], Prunable]] = defaultdict(dict)
    with ExitStack() as stack:
        for prunable in prunables:
            if prunable.expert is None:
                module = owner_of(block, path, prunable)
                hook = partial(_before, prunable, see)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            else:
                holder, _, name = prunable.parameter.rpartition(".")
                fused[holder][name, prunable.expert] = prunable
        for wanted in fused.values():
            module = owner_of(block, path, next(iter(wanted.values())))
            stack.enter_context(tapped(module, partial(_tap, wanted, see)))
        yield


@contextmanager
def observing(
    block: nn.Module, path: str, prunables: list[Prunable], callback: See, calls: Mapping[str, int], stop: bool
) -> Iterator[None]:
    """`seeing` with inputs as [tokens, in]; `stop` raises Stop once each was seen as often as `calls` says."""
    uses = {p.name: calls.get(p.name, 1) for p in prunables}
    left: dict[str, int] = {}

    def begin(*_: object) -> None:
        left.update(uses)

    def see(prunable: Prunable, x: torch.Tensor) -> None:
        callback(prunable, x.detach().reshape(-1, prunable.shape[1]))
        left[prunable.name] -= 1
        if stop and all(count <= 0 for count in left.values()):
            raise Stop

    with ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(begin).remove)
        stack.enter_context(seeing(block, path, prunables, see))
        stack.enter_context(suppress(Stop) if stop else nullcontext())
        yield


class InputLog:
    """Notes which matrix multiplied which tensor during one pass, and turns that into steps."""

    def __init__(self, path: str, prunables: list[Prunable]) -> None:
        self._path = path
        self._prunables = prunables
        self._inputs: dict[str, list[tuple[Any, ...]]] = {}
        self._alive: list[torch.Tensor] = []  # an address says nothing once its tensor is gone

    def see(self, prunable: Prunable, x: torch.Tensor) -> None:
        """One use of one matrix. Views of the same values (reshaped) count as the same input."""
        key: tuple[Any, ...] = (x.data_ptr(), x.numel(), x.stride()[-1:], x._version)
        if prunable.expert is not None or not x.numel():
            key = (prunable.name,)
        self._inputs.setdefault(prunable.name, []).append(key)
        self._alive.append(x)

    @property
    def calls(self) -> dict[str, int]:
        """Uses per matrix in the pass."""
        return {name: len(keys) for name, keys in self._inputs.items()}

    def steps(self) -> list[Step]:
        """Groups in call order; those of sibling experts (equal names up to numbers) in one step.

        Matrices the pass never used (experts that no token chose) join their siblings' step, or come last. Inside a
        step everything is in module order, so that ranks which looked at different windows agree.
        """
        groups = self._seen_groups()
        self._add_unseen(groups)
        order = {p: i for i, p in enumerate(self._prunables)}
        for group in groups:
            group.sort(key=order.__getitem__)
        steps: list[Step] = []
        place: dict[tuple[str, ...], int] = {}
        for group in groups:
            kind = tuple(sorted(self._canonical(p) for p in group))
            if kind in place:
                steps[place[kind]].append(group)
            else:
                place[kind] = len(steps)
                steps.append([group])
        for step in steps:
            step.sort(key=lambda group: order[group[0]])
        return steps

    def _seen_groups(self) -> list[Group]:
        by_name = {p.name: p for p in self._prunables}
        groups: dict[tuple[Any, ...], Group] = {}
        for name, keys in self._inputs.items():
            groups.setdefault(tuple(keys), []).append(by_name[name])
        return list(groups.values())

    def _add_unseen(self, groups: list[Group]) -> None:
        together = {self._canonical(p): i for i, group in enumerate(groups) for p in group}
        new: dict[tuple[Any, ...], Group] = {}
        for p in self._prunables:
            if p.name not in self._inputs:
                sibling = together.get(self._canonical(p), p.name)
                new.setdefault((sibling, self._numbers(p)), []).append(p)
        groups += new.values()

    def _canonical(self, p: Prunable) -> str:
        return ".".join("*" if part.isdigit() else part for part in p.name.removeprefix(self._path).split("."))

    def _numbers(self, p: Prunable) -> tuple[str, ...]:
        return tuple(part for part in p.name.removeprefix(self._path).split(".") if part.isdigit())


def _before(prunable: Prunable, see: See, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    see(prunable, args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor)))


def _tap(wanted: dict[tuple[str, int], Prunable], see: See, name: str, expert: int, x: torch.Tensor) -> None:
    prunable = wanted.get((name, expert))
    if prunable is not None:
        see(prunable, x)
