"""The baseline that every trained method has to beat: the best of n random sparse subnetworks at an equal budget."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from .imp import Score, tighten
from .mask import Mask
from .pattern import Pattern


def random_score(seed: int) -> Score:
    """A score that is uniform in [0, 1), by `seed` and the matrix's name alone: the same on every machine and rank."""

    def score(name: str, weight: Tensor) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(weight.shape, generator=draw, dtype=torch.float32).to(weight.device)

    return score


def random_masks(
    weights: Mapping[str, Tensor], masks: Mapping[str, Mask], pattern: Pattern, seed: int
) -> dict[str, Mask]:
    """Masks of `pattern` at random inside `masks`; counts exact as in `tighten`."""
    return tighten(weights, masks, pattern, random_score(seed))


def share(budget: int, tries: int) -> int:
    """Training steps of each of `tries` subnetworks when all together have `budget`. RecipeError below one step."""
    if tries < 1 or budget // tries < 1:
        raise RecipeError(
            f"{budget} training steps cannot be shared by {tries} random subnetworks",
            hint=f"use between 1 and {budget} tries",
        )
    return budget // tries


def best(results: list[dict[str, Any]], key: str = "heldout_loss") -> int:
    """Index of the lowest `key`; of equal ones the first."""
    return min(range(len(results)), key=lambda index: results[index][key])
