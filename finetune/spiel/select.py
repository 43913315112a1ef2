"""Positions to begin with, by a score of the weights or of gradients on data.

gradient, Fisher and SNIP scores as masks for fine-tuning: Liu et al., "SPEFT", 2025, and the works it compares; SNIP:
Lee et al., 2019. Scores are summed over all batches in a sketch that holds a few times as many positions as will be
chosen, see `candidates`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ..budget import CEILING, FLOOR, share_out, total
from .candidates import Candidates
from .config import BY_DATA, SpielConfig
from .layer import Linear, layers_of
from .positions import is_kept
from .ranks import check_equal
from .top import TopPool, highest

HELD = 4  # positions that are followed, per position to be chosen


class Scores(Candidates):
    """Candidates whose gradients are multiplied by the weights first: w sum g = sum w g."""

    weight: Tensor | None = None

    def begin(self, first: int | None) -> None:
        """Every pass counts: gradients are cleared after each of them, and no update is under way."""
        super().begin(None)

    def _prepared(self, first_row: int, block: Tensor) -> Tensor:
        if self.weight is not None:
            block.mul_(self.weight[first_row : first_row + len(block)])
        return super()._prepared(first_row, block)


@contextmanager
def selecting(model: nn.Module, adapter_name: str = "default") -> Iterator[None]:
    """Inside the block, backward passes are scored; at its end the adapter's entries lie at the best positions.

    Run `loss.backward()` for some batches and clear the gradients. Before an optimizer is made: under allocation
    "global" the parameters get other lengths.

    Raises:
        RecipeError: the adapter's selection is not one by data.
    """
    config = model.peft_config[adapter_name]  # type: ignore[union-attr,index]
    assert isinstance(config, SpielConfig)
    if config.selection not in BY_DATA:
        raise RecipeError(
            f"selection {config.selection!r} looks at no data; those that do: {', '.join(BY_DATA)}",
        )
    layers = layers_of(model, adapter_name)
    shares = _shares(layers, adapter_name, config)
    held = HELD if config.allocation != "global" else max(HELD, round(CEILING))
    scores = [_scores(layer, adapter_name, held * k, config.selection) for layer, k in zip(layers, shares, strict=True)]
    for layer, one in zip(layers, scores, strict=True):
        layer.watches[adapter_name] = one
    try:
        yield
    finally:
        for layer in layers:
            layer.watches.pop(adapter_name, None)
    for one in scores:
        one.fold(1.0, (0.0, 0.0))
    found = [(one.tensors["position"], one.scores()) for one in scores]
    chosen = _chosen(found, shares, [layer.room(adapter_name) for layer in layers], config.allocation)
    for layer, flat, k in zip(layers, chosen, shares, strict=True):
        if config.allocation != "global" and len(flat) < k:
            flat = _completed(flat, layer.flat(adapter_name), k)
        layer.set_delta(adapter_name, flat, torch.zeros(len(flat)))
    check_equal([layer.flat(adapter_name) for layer in layers], "the chosen positions")


def strongest_weights(layers: list[Linear], adapter_name: str, shares: list[int], allocation: str) -> list[Tensor]:
    """Positions of the largest |w| that are allowed, per layer or of all layers together."""
    held = 1 if allocation != "global" else round(CEILING)
    found = []
    for layer, k in zip(layers, shares, strict=True):
        weight = layer.get_base_weight()
        weight = weight.t() if layer.base.transposed else weight
        pool = TopPool(min(held * k, layer.room(adapter_name)), weight.device)
        allowed = layer.allowed(adapter_name)
        for first in range(0, len(weight), height := max(1, (1 << 22) // layer.in_features)):
            slab = weight[first : first + height].detach().float()
            if allowed is not None:
                place = torch.arange(slab.numel(), device=slab.device) + first * layer.in_features
                slab = slab.masked_fill(~is_kept(allowed, place).view_as(slab), 0.0)
            pool.offer(first * layer.in_features, slab)
        order = pool.position.argsort()
        found.append((pool.position[order], pool.value[order].abs()))
    rooms = [layer.room(adapter_name) for layer in layers]
    chosen = _chosen(found, shares, rooms, allocation)
    if allocation == "global":
        return chosen
    return [
        _filled(layer, adapter_name, flat, k) if len(flat) < k else flat
        for layer, flat, k in zip(layers, chosen, shares, strict=True)
    ]


def _chosen(found: list[tuple[Tensor, Tensor]], shares: list[int], rooms: list[int], allocation: str) -> list[Tensor]:
    """The best of the found positions per layer; both ascend. Under "global" the counts are of a common threshold."""
    counts = shares if allocation != "global" else global_counts([score for _, score in found], shares, rooms)
    return [position[highest(score, k)] for (position, score), k in zip(found, counts, strict=True)]


def global_counts(scores: list[Tensor], shares: list[int], rooms: list[int]) -> list[int]:
    """Entries per layer when the highest scores of all layers are taken: as many as sum(shares), if there are so many.

    Every layer gets at least FLOOR and at most CEILING times its share. Ties go to the earlier layer.
    """
    least = [min(int(FLOOR * k), len(score)) for k, score in zip(shares, scores, strict=True)]
    most = [min(round(CEILING * k), len(s), room) for k, s, room in zip(shares, scores, rooms, strict=True)]
    descending = [score.sort(descending=True).values.cpu() for score in scores]
    free = torch.cat([d[a:b] for d, a, b in zip(descending, least, most, strict=True)])
    owner = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(zip(least, most, strict=True))])
    taken = owner[free.argsort(descending=True, stable=True)[: max(0, sum(shares) - sum(least))]]
    extra = torch.bincount(taken, minlength=len(scores)).tolist()
    return [a + b for a, b in zip(least, extra, strict=True)]


def _scores(layer: Linear, adapter_name: str, capacity: int, selection: str) -> Scores:
    device = layer.spiel_values[adapter_name].device
    none = torch.empty(0, dtype=torch.int64, device=device)
    power = 2 if selection == "fisher" else 1
    made = Scores(layer.out_features, layer.in_features, capacity, none, layer.allowed(adapter_name), power)
    if selection == "snip":
        weight = layer.get_base_weight()
        made.weight = weight.t() if layer.base.transposed else weight
    return made


def _shares(layers: list[Linear], adapter_name: str, config: SpielConfig) -> list[int]:
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    count = total(shapes, config.density, config.num_weights, config.rank_equivalent)
    return share_out(count, shapes, [layer.room(adapter_name) for layer in layers], config.allocation)


def _completed(flat: Tensor, before: Tensor, count: int) -> Tensor:
    """Where fewer positions had a score than are needed, some of those from before stay."""
    rest = before[~torch.isin(before, flat)][: count - len(flat)]
    return torch.cat([flat, rest]).sort().values


def _filled(layer: Linear, adapter_name: str, flat: Tensor, count: int) -> Tensor:
    """Weights that are zero have no score; the first of them make up the number."""
    size, allowed = layer.out_features * layer.in_features, layer.allowed(adapter_name)
    rest = torch.ones(size, dtype=torch.bool) if allowed is None else allowed.to_bool().reshape(-1).cpu().clone()
    rest[flat.cpu()] = False
    return torch.cat([flat.cpu(), rest.nonzero().flatten()[: count - len(flat)]]).sort().values
