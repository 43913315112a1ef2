"""Layers that get the same input one after the other, computed in one call: query, key and value; gate and up.

Which layers these are is not read from a model's code but seen while it runs: two layers that are called in turn with
the very same tensor belong together from then on. The first of them then computes all, the others hand out what is
there. What is handed out is always what the layer itself would have computed: the tensor must be the same object, and
not written to in between.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    """A layer whose weight is one tensor."""

    siblings: Siblings | None
    alone: bool

    def matrix(self) -> Tensor: ...


class Siblings:
    """Layers in the order of their calls, or `given` ones in any order. Copies of a layer start without."""

    def __init__(self, first: Layer, given: Sequence[Layer] = ()) -> None:
        self.layers = [*given] or [first]
        self.given = bool(given)
        self._held: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def take(self, layer: Layer, x: Tensor) -> Tensor | None:
        """What an earlier call computed for `layer` from this very x, once."""
        held = self._held
        if held is None or held[0] is not x or held[1] != x._version:
            return None
        result = held[2].pop(id(layer), None)
        if not held[2]:
            self._held = None
        return result

    def compute(self, layer: Layer, x: Tensor, run: Callable[[Tensor, list[Any]], list[Tensor]]) -> Tensor:
        """The result of `layer`; of the first of its siblings also the others', kept for them. `run`: of layers."""
        if layer is not self.layers[0] and not self.given:
            return run(x, [layer])[0]
        if self._held is not None:  # somebody did not come for his result: they are not always called in turn
            self._part()
            return run(x, [layer])[0]
        matrices = [(other, other.matrix()) for other in self.layers]
        here = [other for other, one in matrices if one.device == x.device and not wants_gradient(one)]
        results = run(x, here)
        kept = {id(other): y for other, y in zip(here, results, strict=True)}
        own = kept.pop(id(layer))
        if kept:
            self._held = x, x._version, kept
        return own

    def _part(self) -> None:
        self._held = None
        for layer in self.layers:
            layer.siblings, layer.alone = None, True


Run = Callable[[Tensor, list[Tensor]], list[Tensor]]


class _Last(threading.local):
    x: weakref.ref[Tensor] | None = None
    layer: weakref.ref[Any] | None = None
    run: Run | None = None


_last = _Last()


def product(layer: Layer, x: Tensor, run: Run) -> Tensor:
    """`run(x, [layer.matrix()])[0]`, together with the layer's siblings where it has some."""
    if x.is_inference():  # its writes are not counted
        return run(x, [layer.matrix()])[0]
    group = layer.siblings
    if group is not None:
        found = group.take(layer, x)
        if found is not None:
            return found
        return group.compute(layer, x, lambda x, layers: run(x, [one.matrix() for one in layers]))
    if not layer.alone:
        _learn(layer, x, run)
    return run(x, [layer.matrix()])[0]


def _learn(layer: Layer, x: Tensor, run: Run) -> None:
    before = _last.layer() if _last.layer is not None else None
    same = _last.x is not None and _last.x() is x and _last.run is run
    if same and before is not None and before is not layer and not before.alone:
        if before.siblings is None:
            before.siblings = Siblings(before)
        if before.siblings.layers[-1] is before:
            before.siblings.layers.append(layer)
            layer.siblings = before.siblings
    _last.x, _last.layer, _last.run = weakref.ref(x), weakref.ref(layer), run


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a product of these is differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
