"""Adding a delta to the weights and taking it out again, exactly, with an account of what rounding swallowed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError, RecipeError
from ...pruning.mask import Mask
from ...pruning.pattern import Pattern, Unstructured, parse_pattern
from .positions import is_kept


@dataclass(frozen=True)
class MergeReport:
    """What became of one layer's delta.

    Attributes:
        entries: number of entries, without those that are zero.
        lost: entries whose weight did not change: the delta is below the weight's rounding.
        error: ||applied - delta|| / ||delta||.
    """

    entries: int
    lost: int
    error: float

    @property
    def lost_share(self) -> float:
        return self.lost / self.entries if self.entries else 0.0


@dataclass(frozen=True)
class Overwritten:
    """What a merge wrote over: flat positions in the [out, in] view, and the weights that were there."""

    flat: Tensor
    old: Tensor


def add(
    weight: Tensor, transposed: bool, flat: Tensor, values: Tensor, stored: torch.dtype | None = None
) -> tuple[Overwritten, MergeReport]:
    """weight += delta in place: summed in float32 (float64 for a float64 weight), rounded once.

    Args:
        weight: [out, in], or [in, out] if `transposed`.
        flat: positions in the [out, in] view.
        values: float32 [K].
        stored: the dtype that the weight will be written in, where that is not its own; the account is of that.
    """
    place, old, new = summed(weight, transposed, flat, values)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weight[place] = new
    written, before = (new, old) if stored is None else (new.to(stored), old.to(stored))
    used = values != 0
    applied = written.to(wide) - before.to(wide)
    norm = float(torch.linalg.vector_norm(values.to(wide)))
    error = float(torch.linalg.vector_norm(applied - values.to(wide))) / norm if norm else 0.0
    return Overwritten(flat, old), MergeReport(int(used.sum()), int((used & (written == before)).sum()), error)


def summed(
    weight: Tensor, transposed: bool, flat: Tensor, values: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """(index of the entries, the weights there, weights plus delta) with nothing written. ModelError if not finite."""
    place = _place(weight, transposed, flat)
    old = weight[place].clone()
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    new = (old.to(wide) + values.to(wide)).to(weight.dtype)
    if not bool(torch.isfinite(new).all()):
        raise ModelError("merging gives weights that are not finite", hint="the delta or the weight overflows")
    return place, old, new


def restore(weight: Tensor, transposed: bool, overwritten: Overwritten) -> None:
    """The weights as they were, bit for bit."""
    weight[_place(weight, transposed, overwritten.flat)] = overwritten.old.to(weight.device)


def check_zeros(mask: Mask, flat: Tensor, name: str) -> None:
    """ModelError if a delta that may only touch surviving weights has an entry where the mask prunes."""
    outside = int((~is_kept(mask, flat)).sum())
    if outside:
        raise ModelError(
            f"{name}: {outside} entries of the adapter lie on pruned weights; merging would undo the pruning",
            hint="the adapter was trained on another mask",
        )


def prune_again(weight: Tensor, transposed: bool, mask: Mask) -> tuple[Overwritten, Mask]:
    """Prunes a weight in which pruned entries were revived to the mask's pattern, by magnitude, in place.

    The number of zeros is exactly the mask's; of N:M and blocks also their place. Returns what was overwritten and the
    new mask.
    """
    view = weight.t() if transposed else weight
    keep = _pattern(mask).mask(view.to(torch.float32).abs())
    fresh = Mask.from_bool(keep.cpu(), mask.pattern)
    if fresh.zeros != mask.zeros:
        raise ModelError(f"pattern {mask.pattern} gives {fresh.zeros} zeros, the mask had {mask.zeros}")
    gone = (~keep & ((view != 0) | torch.signbit(view))).reshape(-1).nonzero().flatten()
    place = _place(weight, transposed, gone)
    old = weight[place].clone()
    weight[place] = 0.0
    return Overwritten(gone, old), fresh


def renewed(held: Any, mask: Mask) -> Any:
    """`mask` in the form in which a model holds its masks: a Mask, or an object of `bits` and a `record` of them."""
    if not hasattr(held, "record"):
        return mask
    size = mask.shape[0] * mask.cols
    record = replace(held.record, nnz=size - mask.zeros, mask_sha256=mask.sha256())
    return replace(held, bits=mask.bits, record=record)


def _pattern(mask: Mask) -> Pattern:
    """The pattern that a mask names; where its count differs, and for masks of no one pattern, that very count."""
    exact = Unstructured.for_count(mask.zeros, *mask.shape)
    try:
        named = parse_pattern(mask.pattern)
        named.check(*mask.shape, "the matrix")
    except RecipeError:  # a name that says nothing, such as "mixed"
        return exact
    return named if named.zeros(*mask.shape) == mask.zeros else exact


def _place(weight: Tensor, transposed: bool, flat: Tensor) -> tuple[Tensor, Tensor]:
    flat = flat.to(weight.device)
    cols = weight.shape[0] if transposed else weight.shape[1]
    row, column = flat // cols, flat % cols
    return (column, row) if transposed else (row, column)
