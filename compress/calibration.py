"""Statistics of layer inputs: one pass over the calibration windows fills one accumulator per shared input.

For an input x (q, k and v share one, gate and up share one), over all tokens of all windows:

    gram   = sum x x^T          [in, in]     accumulated in float64, delivered in float32
    target = sum y x^T          [out, in]    y = W x_dense, the output the dense model gives at the same token; for a
                                             matrix that writes into the residual stream, the output that would repair
                                             the stream there (residual.py)
    holdout                     x, y of the last tenth of every window (at most HOLDOUT_TOKENS in all)

Sums of float32 products are kept in float64, so that one process and several processes, which add in another order,
round to the same float32 statistics and choose the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..pruning.base import Holdout, LayerStats
from . import distributed
from .blocks import BlockArgs, Prunable, StreamedModel
from .hidden import HiddenStore
from .residual import needed, watching

HOLDOUT_TOKENS = 4096
HOLDOUT_SHARE = 0.1


@dataclass
class Accumulator:
    """Sums for one shared input of the matrices `rows` (name -> number of outputs).

    `weights`: float32 [out, in] of the dense matrices, given only when outputs are needed (target or holdout).
    """

    width: int
    needs: frozenset[str]
    holdout_rows: int
    rows: Mapping[str, int]
    weights: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    energy: Tensor | None = None
    gram: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    held_x: list[Tensor] = field(default_factory=list)
    held_y: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, x: Tensor, dense_x: Tensor | None, errors: Mapping[str, Tensor] | None = None) -> None:
        """Add the tokens x [t, in] of one window.

        dense_x: the dense model's input at the same tokens, None = x. errors: matrix -> z_dense - z_sparse [t, out]
        where it writes into the residual stream.
        """
        errors = errors or {}
        x = x.float()
        dense = x if dense_x is None else dense_x.float()
        self.tokens += x.shape[0]
        self._add_energy(x)
        if "gram" in self.needs:
            self.gram = _add64(self.gram, x.T @ x)
        held = min(self.holdout_rows, x.shape[0]) if "holdout" in self.needs else 0
        if held:
            self.held_x.append(x[-held:].clone())
        for name, weight in self.weights.items():
            y = x @ weight.T + errors[name] if name in errors else dense @ weight.T
            if "target" in self.needs:
                self.targets[name] = _add64(self.targets.get(name), y.T @ x)
            if held:
                self.held_y.setdefault(name, []).append(y[-held:].clone())

    def _add_energy(self, x: Tensor) -> None:
        energy = x.double().square().sum(0)
        self.energy = energy if self.energy is None else self.energy + energy

    def reduce(self, device: torch.device) -> None:
        """Sum over the ranks. Every rank must call it for the same inputs in the same order."""
        if distributed.world() == 1:
            return
        width = self.width
        count = distributed.sum_(torch.tensor([self.tokens], dtype=torch.int64, device=device))
        self.tokens = int(count)
        zero = torch.zeros(width, dtype=torch.float64, device=device)
        self.energy = distributed.sum_(zero if self.energy is None else self.energy)
        if "gram" in self.needs:
            self.gram = distributed.sum_(_or_zeros(self.gram, width, width, device))
        if "target" in self.needs:
            for name, rows in self.rows.items():
                self.targets[name] = distributed.sum_(_or_zeros(self.targets.get(name), rows, width, device))
        if "holdout" in self.needs:
            self.held_x = [distributed.gather_rows(_stack(self.held_x, width, device))]
            for name, rows in self.rows.items():
                stacked = _stack(self.held_y.get(name, []), rows, device)
                self.held_y[name] = [distributed.gather_rows(stacked)]

    def finish(self) -> dict[str, LayerStats]:
        """The float32 statistics of every matrix on this input; the sums are freed on the way."""
        gram = None if self.gram is None else self.gram.float()
        self.gram = None
        norm = None if self.energy is None else self.energy.sqrt().float()
        held_x = torch.cat(self.held_x) if self.held_x else None
        self.held_x = []
        result = {}
        for name in self.rows:
            target = self.targets.pop(name).float() if name in self.targets else None
            held_y = self.held_y.pop(name, None)
            holdout = None if held_x is None or not held_y else Holdout(held_x, torch.cat(held_y))
            result[name] = LayerStats(tokens=self.tokens, norm=norm, gram=gram, target=target, holdout=holdout)
        return result


def collect(
    model: StreamedModel,
    block_index: int,
    block: torch.nn.Module,
    dense_block: torch.nn.Module | None,
    groups: Sequence[Sequence[Prunable]],
    hidden: HiddenStore,
    dense_hidden: HiddenStore | None,
    args: BlockArgs,
    needs: frozenset[str],
    windows: int,
    places: Mapping[str, str] | None = None,
) -> dict[str, LayerStats]:
    """Statistics of every matrix in `groups`, keyed by name, from this rank's windows and summed over the ranks.

    `block` sees `hidden` (the pruned-so-far model); with "target" in needs, `dense_block` sees `dense_hidden`.
    `places`: where matrices write into the residual stream (`residual.residual_places`).
    Experts take their own output as the target: the dense model routes other tokens to them.
    """
    asymmetric = dense_block is not None and dense_hidden is not None
    reference = dense_block or block
    writers = frozenset(places or ()) if asymmetric else frozenset()
    accumulators = {
        group[0].name: accumulator_for(model, reference, group, needs, windows, args.length) for group in groups
    }
    for group in groups:
        for member in group:
            if member.name in writers and accumulators[group[0].name].weights:
                accumulators[group[0].name].weights[member.name] = model.weight(block, member).float()
    stream = needed(groups, places or {}) if writers else []
    leaders = [group[0] for group in groups]
    dense_leaders = [leader for leader in leaders if leader.kind != "expert"]
    for window in distributed.my_share(windows):
        dense_x: dict[str, Tensor] = {}
        error: dict[str, Tensor] = {}
        if asymmetric and dense_leaders:
            assert dense_block is not None
            assert dense_hidden is not None
            dense_x, error = inputs_of(
                model, block_index, dense_block, dense_leaders, dense_hidden, args, window, stream
            )
        inputs, z = inputs_of(model, block_index, block, leaders, hidden, args, window, stream)
        error = {place: (error[place].float() - z[place].float()).view(-1, z[place].shape[-1]) for place in error}
        for group in groups:
            name = group[0].name
            if name in inputs:
                mine = {p.name: error[(places or {})[p.name]] for p in group if p.name in writers}
                accumulators[name].add(inputs[name], dense_x.get(name), mine)
        del dense_x, inputs, error, z
    result: dict[str, LayerStats] = {}
    for accumulator in accumulators.values():
        accumulator.reduce(model.device)
        result |= accumulator.finish()
    return result


def inputs_of(
    model: StreamedModel,
    block_index: int,
    block: torch.nn.Module,
    leaders: Sequence[Prunable],
    hidden: HiddenStore,
    args: BlockArgs,
    window: int,
    stream: Sequence[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs [tokens, in] of the leaders in one window by name, and the residual stream by place.

    The pass ends once everything was seen. A matrix that is used several times gives all its inputs, one after another.
    """
    seen: dict[str, list[Tensor]] = {}
    z: dict[str, Tensor] = {}
    unpack = args.returns[block_index].unpack
    with ExitStack() as stack:
        if stream:
            stack.enter_context(watching(block, stream, unpack, z.__setitem__))
        watch = model.observe(
            block, leaders, lambda prunable, x: seen.setdefault(prunable.name, []).append(x), stop=not stream
        )
        stack.enter_context(watch)
        model.run_block(block_index, block, hidden.get(window), args, window, allow_stop=True)
    return {name: inputs[0] if len(inputs) == 1 else torch.cat(inputs) for name, inputs in seen.items()}, z


def accumulator_for(
    model: StreamedModel,
    block: torch.nn.Module,
    group: Sequence[Prunable],
    needs: frozenset[str],
    windows: int,
    length: int,
) -> Accumulator:
    """An empty accumulator for the matrices of one group; `block` holds their dense weights."""
    held = max(1, min(HOLDOUT_TOKENS // max(windows, 1), math.ceil(HOLDOUT_SHARE * length)))
    wanted = needs if group[0].kind != "expert" else needs - {"target"}
    outputs = wanted & {"target", "holdout"}
    weights = {member.name: model.weight(block, member).float() for member in group} if outputs else {}
    rows = {member.name: member.shape[0] for member in group}
    return Accumulator(width=group[0].shape[1], needs=wanted, holdout_rows=held, rows=rows, weights=weights)


def _add64(total: Tensor | None, part: Tensor) -> Tensor:
    return part.double() if total is None else total.add_(part)


def _or_zeros(total: Tensor | None, rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64, device=device) if total is None else total


def _stack(parts: list[Tensor], width: int, device: torch.device) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, width, device=device)
