"""How adapters of LoRA are merged where a mask holds, said once for packed and for dense layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from ..errors import KernelError, RecipeError

MERGES = ("refuse", "masked", "dense")
_HOW: ContextVar[str] = ContextVar("merge of adapters on sparse layers", default="refuse")


@contextmanager
def merging(how: str) -> Iterator[None]:
    """Inside, adapters are merged into sparse layers in this way.

    "refuse": KernelError if the adapter changes pruned weights. "masked": those changes are dropped, a warning says how
    much of the adapter that is. "dense": the layer becomes an ordinary one, and the model dense there.
    """
    if how not in MERGES:
        raise RecipeError(f"merge {how!r} is unknown; allowed: {', '.join(MERGES)}")
    token = _HOW.set(how)
    try:
        yield
    finally:
        _HOW.reset(token)


def way() -> str:
    """The one of MERGES that holds here."""
    return _HOW.get()


def tell_lost(adapter: str, lost: Tensor, delta: Tensor) -> None:
    """KernelError or a warning for the part of a delta that lies on pruned weights; nothing where it is all zero."""
    if not bool(lost.any()):
        return
    share = float(lost.norm() ** 2 / delta.norm() ** 2)
    what = f"the adapter {adapter} changes pruned weights: {100 * share:.0f} % of its squared norm"
    if way() == "refuse":
        raise KernelError(
            f"{what} would be lost in a sparse layer",
            hint='keep it unmerged, or choose: `with gossamer.merging("masked"):` drops that part, "dense" makes '
            "ordinary layers",
        )
    warnings.warn(f"{what} is dropped by the merge", stacklevel=6)


class Undoable:
    """A layer of peft whose merges can be taken back one by one, bit for bit."""

    def take_back(self, count: int) -> None:
        """Undo the last merges until `count` are left."""
        raise NotImplementedError

    def try_merge(self: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raises what `merge` would raise; the layer is as before."""
        before = len(self.merged_adapters)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.merge(safe_merge, adapter_names)
        finally:
            self.take_back(before)


def check_merges(model: nn.Module, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Raises what a merge of all layers would raise, before the first of them is changed; a layer in memory at a time.

    Else a refusal in the middle leaves a model that is half merged.
    """
    for layer in model.modules():
        if isinstance(layer, Undoable):
            with onload_layer(layer):
                layer.try_merge(safe_merge, adapter_names)
