"""Statistics of layer inputs: one pass over the calibration windows fills one accumulator per shared input.

For an input x (q, k and v share one, gate and up share one), over all tokens of all windows:

    gram   = sum x x^T          [in, in]     accumulated in float64, delivered in float32
    target = sum y x^T          [out, in]    y = W x_dense, the output the dense model gives at the same token; for a
                                             matrix that writes into the residual stream, the output that would repair
                                             the stream there (residual.py)
    excess = sum (y - W x) x^T  [out, in]    instead of the target, for a large matrix of a method that takes either
    holdout                     x, y of the last tenth of every window (at most HOLDOUT_TOKENS in all)

Float32 products are added in float64. With several processes each runs its own windows through the block; the inputs
are then shown to all of them in the order of the windows, and each adds up its own part of the matrices (sums.py). So
the statistics, and with them the masks, are those of one process bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from ..pruning.base import Holdout, LayerStats, is_large
from . import distributed
from .blocks import BlockArgs, Prunable, StreamedModel
from .hidden import HiddenStore
from .residual import OUTPUT, needed, watching
from .sums import OuterSum

HOLDOUT_TOKENS = 4096
HOLDOUT_SHARE = 0.1
X, DENSE, ERROR = "x ", "dense ", "error "  # what a window shows, by kind


class Accumulator:
    """Sums for one shared input of the matrices `rows` (name -> number of outputs).

    `weights`: float32 [out, in] of the matrices, given only when outputs are needed (target or holdout). `writers`: the
    matrices that write into the residual stream. `unpruned`: the weights of the others (the dense ones) are those
    pruned next. Targets are never summed as such: for the others they are W sum x_dense x^T, for writers
    W gram + sum (z_dense - z_sparse) x^T, half the work or less.
    """

    def __init__(
        self,
        width: int,
        needs: frozenset[str],
        holdout_rows: int,
        rows: Mapping[str, int],
        weights: Mapping[str, Tensor],
        writers: frozenset[str],
        device: torch.device,
        *,
        unpruned: bool = False,
    ) -> None:
        self.rows, self.weights = rows, weights
        large = {name for name in rows if is_large(rows[name], width) and {"gram", "target", "excess"} <= needs}
        others = rows.keys() - writers  # they share one sum, in one form
        self.in_excess = (large & writers) | (others if unpruned and others <= large else set())
        self.holdout_rows = holdout_rows if "holdout" in needs else 0
        self.tokens = 0
        self.gram = OuterSum(width, width, device, symmetric=True) if "gram" in needs else None
        self.energy = None
        if self.gram is None or "norm" in needs:
            self.energy = torch.zeros(width, dtype=torch.float64, device=device)
        target = "target" in needs
        self.cross = OuterSum(width, width, device) if target and len(writers) < len(rows) else None
        self.repairs = {name: OuterSum(rows[name], width, device) for name in sorted(writers) if target}
        self.held_x = [torch.zeros(0, width, device=device)]
        self.held_y = {name: [torch.zeros(0, rows[name], device=device)] for name in weights}

    def add(self, x: Tensor, dense_x: Tensor | None, errors: Mapping[str, Tensor] | None = None) -> None:
        """Add the tokens x [t, in] of one window.

        dense_x: the dense model's input at the same tokens, None = x. errors: writer -> z_dense - z_sparse [t, out].
        """
        errors = errors or {}
        x = x.float().contiguous()
        dense = x if dense_x is None else dense_x.float().contiguous()
        self.tokens += x.shape[0]
        if self.energy is not None:
            self.energy += x.double().square().sum(0)
        if self.gram is not None:
            self.gram.add(x, x)
        if self.cross is not None:
            self.cross.add(dense, x)
        for name, total in self.repairs.items():
            total.add(errors[name], x)
        held = min(self.holdout_rows, x.shape[0])
        if held:
            self._hold(x[-held:], dense[-held:], {name: error[-held:] for name, error in errors.items()})

    def _hold(self, x: Tensor, dense: Tensor, errors: Mapping[str, Tensor]) -> None:
        self.held_x.append(x.clone())
        for name, weight in self.weights.items():
            y = x @ weight.T + errors[name] if name in errors else dense @ weight.T
            self.held_y[name].append(y)

    def finish(self) -> dict[str, LayerStats]:
        """The float32 statistics of every matrix on this input; the sums are freed on the way.

        Every rank must call it for the same inputs in the same order.
        """
        norm = None if self.energy is None else self.energy.sqrt().float()
        gram = None if self.gram is None else self.gram.take()
        cross = None if self.cross is None else self.cross.take()
        if cross is not None and gram is not None and self.in_excess - self.repairs.keys():
            cross.sub_(gram)
        held_x = torch.cat(self.held_x)
        result = {}
        for name in self.rows:
            aim = self._aim(name, gram, cross)
            target, excess = (None, aim) if name in self.in_excess else (aim, None)
            held_y = self.held_y.pop(name, None)
            holdout = Holdout(held_x, torch.cat(held_y)) if held_y and len(held_x) else None
            result[name] = LayerStats(
                tokens=self.tokens, norm=norm, gram=gram, target=target, excess=excess, holdout=holdout
            )
        return result

    def _aim(self, name: str, gram: Tensor | None, cross: Tensor | None) -> Tensor | None:
        """The target, or the excess where that is given; `cross` is the sum, or the sum less `gram`, to match."""
        if name in self.repairs:
            repair = self.repairs.pop(name).take()
            if name in self.in_excess:
                return repair
            assert gram is not None
            return repair.addmm_(self.weights[name], gram)
        return None if cross is None else self.weights[name] @ cross


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
    passed: set[int] | None = None,
) -> dict[str, LayerStats]:
    """Statistics of every matrix in `groups`, keyed by name, over the windows of all ranks.

    `block` sees `hidden` (the pruned-so-far model); with "target" in needs, `dense_block` sees `dense_hidden`.
    `places`: where matrices write into the residual stream (`residual.residual_places`).
    `passed`: given, `dense_hidden` moves on to the dense block's output for every window whose pass goes that far, and
    the window is added to it. Only for the last pass over a block.
    Experts take their own output as the target: the dense model routes other tokens to them.
    """
    asymmetric = dense_block is not None and dense_hidden is not None
    places = dict(places or {}) if asymmetric else {}
    accumulators = {
        group[0].name: accumulator_for(model, block, dense_block, group, needs, windows, args.length, places)
        for group in groups
    }
    pair = None
    if dense_block is not None and dense_hidden is not None:
        pair = dense_block, dense_hidden
    leaders = [group[0] for group in groups]
    stream = needed(groups, places)
    for window in distributed.turns(windows):
        found = None
        if window is not None:
            found = _measure(model, block_index, block, pair, leaders, hidden, args, window, stream, passed)
        for seen in distributed.in_turn(found, model.device):
            for group in groups:
                name = group[0].name
                if X + name in seen:
                    mine = {p.name: seen[ERROR + places[p.name]] for p in group if p.name in places}
                    accumulators[name].add(seen[X + name], seen.get(DENSE + name), mine)
        del found
    result: dict[str, LayerStats] = {}
    for accumulator in accumulators.values():
        result |= accumulator.finish()
    return result


def _measure(
    model: StreamedModel,
    block_index: int,
    block: torch.nn.Module,
    dense: tuple[torch.nn.Module, HiddenStore] | None,
    leaders: Sequence[Prunable],
    hidden: HiddenStore,
    args: BlockArgs,
    window: int,
    stream: Sequence[str],
    passed: set[int] | None,
) -> dict[str, Tensor]:
    """What one window shows: inputs by leader, the dense model's inputs by leader, stream errors by place."""
    dense_x: dict[str, Tensor] = {}
    dense_z: dict[str, Tensor] = {}
    watched = [leader for leader in leaders if leader.kind != "expert"]
    if dense is not None and watched:
        dense_x, dense_z = inputs_of(model, block_index, dense[0], watched, dense[1], args, window, stream)
        if passed is not None and OUTPUT in dense_z:
            dense[1].put(window, dense_z[OUTPUT])
            passed.add(window)
    x, z = inputs_of(model, block_index, block, leaders, hidden, args, window, stream)
    found = {X + name: value for name, value in x.items()}
    found |= {DENSE + name: value for name, value in dense_x.items()}
    for place, value in dense_z.items():
        found[ERROR + place] = (value.float() - z[place].float()).view(-1, value.shape[-1])
    return found


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
    dense_block: torch.nn.Module | None,
    group: Sequence[Prunable],
    needs: frozenset[str],
    windows: int,
    length: int,
    places: Mapping[str, str],
) -> Accumulator:
    """An empty accumulator for the matrices of one group."""
    held = max(1, min(HOLDOUT_TOKENS // max(windows, 1), math.ceil(HOLDOUT_SHARE * length)))
    wanted = needs if group[0].kind != "expert" else needs - {"target"}
    weights = {}
    if wanted & {"target", "holdout"}:
        for member in group:  # z was made with the weights as they are, other targets with the dense ones
            holder = block if dense_block is None or member.name in places else dense_block
            weights[member.name] = model.weight(holder, member).float()
    return Accumulator(
        width=group[0].shape[1],
        needs=wanted,
        holdout_rows=held,
        rows={member.name: member.shape[0] for member in group},
        weights=weights,
        writers=frozenset(member.name for member in group if member.name in places),
        device=model.device,
        unpruned=dense_block is None
        or all(torch.equal(model.weight(block, member), model.weight(dense_block, member)) for member in group),
    )
