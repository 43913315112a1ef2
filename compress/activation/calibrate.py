"""Calibration of an activation policy, block by block: survey the dense model, share the budget out, fit, correct.

    survey   (methods that share over the whole model) error curves of every site in the dense model
    fit      every block in order; on the dense model's activations, or on those of the sparse blocks below
    correct  what the policy really skips is counted on the calibration windows; the fit is repeated with the goal moved
             by the difference until it is below TOLERANCE

A finished block's entries are durable before the next begins, so a killed run goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...activation_sparsity.base import Policy
from ...activation_sparsity.method import Extent, Fitted, Linears, Method, MLPs
from ...activation_sparsity.refine import balanced
from ...errors import RecipeError
from .. import distributed
from ..blocks import StreamedModel
from ..hidden import HiddenStore
from ..progress import BlockDone, Progress
from ..timing import Clock
from .apply import Reads, applied
from .gather import check_usable, gather
from .parts import InMemory, Parts
from .sites import BlockSites, find_sites
from .survey import survey
from .trials import Trials
from .walk import PROMPT, Walk

TOLERANCE = 0.001  # of the realised sparsity on calibration text
OFF = 0.005  # a policy whose sparsity is further off says so
FITS = 4  # at most
PROBES, PROBED = 4, 1024  # windows on which a block's error is measured, at most, and tokens of them
SEARCH = 16  # windows on which searches run


class Calibration:
    """Makes one policy of a model from calibration windows [n, L]."""

    def __init__(
        self,
        model: StreamedModel,
        windows: Tensor,
        method: Method,
        *,
        memory_bytes: int,
        scratch: Path,
        parts: Parts | None = None,
        progress: Progress | None = None,
        usable: Tensor | None = None,
        prompt: float = PROMPT,
        resident: bool = False,
        name: str = "the calibration text",
        walk: Walk | None = None,
        keep: Path | None = None,
    ) -> None:
        """`scratch`: for files that a restart does not need; `keep`: for those that it does (gradients)."""
        self.model, self.method = model, method
        self.progress = progress or Progress()
        self.parts = parts or InMemory()
        self.usable = torch.ones_like(windows, dtype=torch.bool) if usable is None else usable
        self.walk = walk or Walk(
            model, windows, memory_bytes=memory_bytes, scratch=scratch, prompt=prompt, resident=resident,
        )  # fmt: skip
        check_usable(self.usable, self.walk.start, name)
        self.scratch, self.keep, self.memory_bytes = scratch, keep or scratch, memory_bytes
        self.found: dict[int, BlockSites] = {}
        self._structure()

    def _structure(self) -> None:
        """Sites and MLPs of every block, from the first window in the dense model."""
        hidden = self.walk._embedded.get(0)
        for index in range(self.model.num_blocks):
            block = self.walk.block(index)
            self.found[index] = find_sites(self.model, index, block, hidden, self.walk.args)
            hidden = self.model.run_block(index, block, hidden, self.walk.args, 0)

    @property
    def extent(self) -> Extent:
        """What there is to skip."""
        sizes = {p.name: p.size for i in range(self.model.num_blocks) for p in self.model.prunables(i)}
        gates = others = 0
        for found in self.found.values():
            for _, parts in found.mlps:
                up, down = sizes[parts.up], sizes[parts.down]
                gates += up // 2 if parts.fused else (sizes[parts.gate] if parts.gate is not None else 0)
                others += down + (up // 2 if parts.fused else up)
        sites = sum(p.size for found in self.found.values() for p in found.maps)
        return Extent(sum(sizes.values()), gates, others, sites)

    @property
    def reachable(self) -> float:
        """The highest sparsity that the method can have on this model."""
        return self.method.reachable(self.extent)

    def run(self, target: float) -> Policy:
        """The policy that skips `target` of all linear maps' weights. RecipeError when the method cannot reach it."""
        extent = self.extent
        highest = self.method.reachable(extent)
        if target > highest + 1e-9:
            raise RecipeError(
                f"{self.method.name} can skip at most {highest:.1%} of this model's linear weights, asked for is "
                f"{target:.1%}",
                hint=f"ask for at most {int(highest * 1000) / 1000}"
                + (", or use --activation auto" if self.method.name != "auto" else ""),
            )
        if target <= 0:
            return self._with_facts(self._policy([], None), target, Reads())
        shares = self._shares(target, extent)
        sizes = {site[0].name: sum(p.size for p in site) for found in self.found.values() for site in found.sites}
        goal = target
        tried: list[tuple[float, float]] = []
        best: tuple[float, Policy] | None = None
        for round_ in range(FITS):
            budgets = balanced(shares, sizes, goal * extent.whole) if shares and round_ else shares
            policy, realised = self._fit(round_, goal, target, budgets, extent)
            if best is None or abs(realised - target) < abs(best[0] - target):
                best = realised, policy
            if abs(realised - target) <= TOLERANCE:
                break
            tried.append((goal, realised))
            goal = min(max(_next_goal(tried, target), 0.0), highest)
        assert best is not None
        if abs(best[0] - target) > OFF:
            self.progress.note(
                f"{self.method.name} skips {best[0]:.1%} of the weights on the calibration text, "
                f"not {target:.1%} as asked"
            )
        return best[1]

    def _shares(self, target: float, extent: Extent) -> dict[str, float]:
        if not self.method.surveys:
            return {}
        known = self.parts.budgets()
        if known is None:
            curves = survey(self)
            with closing(self._trials()) as evaluate:
                known = self.method.share(curves, target, extent, evaluate, self.progress.note)
            self.parts.keep_budgets(known)
        return known

    def _fit(
        self, round_: int, goal: float, target: float, budgets: Mapping[str, float], extent: Extent
    ) -> tuple[Policy, float]:
        blocks: list[Fitted] = []
        reads = Reads()
        hidden = self.walk.embedded()
        clock = Clock(self.model.num_blocks)
        self.progress.stage(f"activation policy {self.method.name}", self.model.num_blocks)
        try:
            for index in range(self.model.num_blocks):
                block = self.walk.block(index)
                done = self.parts.block(round_, index)
                counted = Reads()
                if done is None:
                    data = gather(
                        self.walk, index, block, self.found[index], hidden, self.method.needs, self.usable,
                        self.gradients(index),
                    )  # fmt: skip
                    if "error" in self.method.needs:
                        data = _with_error(data, self._error(index, block, hidden))
                    fitted = self.method.fit(data, budgets, goal, extent)
                    del data
                    self._advance(index, block, hidden, fitted, counted)
                    counted = self.walk.all_reads(counted)
                    self.parts.keep_block(round_, index, fitted, counted)
                else:
                    fitted, counted.read, counted.whole = done
                    self.method.restored(index, fitted)
                    self._advance(index, block, hidden, fitted, Reads())
                reads.update(counted)
                blocks.append(fitted)
                seconds, left = clock.tick()
                name = self.model.block_names[index]
                self.progress.block(
                    BlockDone("activation", index, self.model.num_blocks, name, None, counted.sparsity, seconds, left)
                )
        finally:
            hidden.close()
        with closing(self._trials()) as evaluate:
            blocks, guide = self.method.conclude(blocks, evaluate, self.progress.note)
        policy = self._policy(blocks, guide)
        if not self.method.follows:
            reads = self.walk.reads(policy)
        return self._with_facts(policy, target, reads), reads.sparsity

    def _advance(self, index: int, block: nn.Module, hidden: HiddenStore, fitted: Fitted, reads: Reads) -> None:
        policy = Policy("", {}, fitted.linears, fitted.mlps) if self.method.follows else None
        self.walk.advance(index, block, hidden, policy, reads)

    def _error(self, index: int, block: nn.Module, hidden: HiddenStore) -> Callable[[Linears, MLPs], float]:
        """Squared error of the block's output at sparse positions, over that of what the block adds."""
        count = min(PROBES, max(1, PROBED // self.walk.windows.shape[1]), len(self.walk.windows))
        x = torch.cat([hidden.get(w) for w in distributed.followed(count)][:count])
        start, args = self.walk.start, self.walk.args
        dense = self.model.run_block(index, block, x, args, 0)[:, start:].float()
        size = float((dense - x[:, start:].float()).square().sum().clamp_min(1e-30))

        def error(linears: Linears, mlps: MLPs) -> float:
            with applied(self.model, index, block, Policy("", {}, linears, mlps), start):
                y = self.model.run_block(index, block, x, args, 0)[:, start:].float()
            return float((y - dense).square().sum()) / size

        return error

    def _trials(self) -> Trials:
        names = [
            [*(p.name for p in self.model.prunables(index)), *(path for path, _ in self.found[index].mlps)]
            for index in range(self.model.num_blocks)
        ]
        return Trials(lambda: self.search_walk, lambda blocks: self._policy(blocks, None), names, self.memory_bytes)

    @property
    def search_walk(self) -> Walk:
        """A few windows, for searches that look at the whole model; made when first used."""
        if not hasattr(self, "_search"):
            folder = self.scratch / "search"
            folder.mkdir(parents=True, exist_ok=True)
            windows = self.walk.windows[:SEARCH]
            self._search = Walk(
                self.model, windows, memory_bytes=self.memory_bytes, scratch=folder, resident=self.walk.resident
            )
            self._search.share_blocks(self.walk)
        return self._search

    def _policy(self, blocks: Sequence[Fitted], guide: Any) -> Policy:
        shapes = {p.name: p.shape for i in range(self.model.num_blocks) for p in self.model.prunables(i)}
        sites = {p.name: site[0].name for found in self.found.values() for site in found.sites for p in site}
        linears = {name: entry for block in blocks for name, entry in block.linears.items()}
        mlps = {name: entry for block in blocks for name, entry in block.mlps.items()}
        facts = {key: value for block in blocks for key, value in block.facts.items()}
        merged: dict[str, Any] = {}
        for block in blocks:
            for key, value in block.facts.items():
                merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
        return Policy(self.method.name, shapes, linears, mlps, sites, guide, {**facts, **merged})

    def _with_facts(self, policy: Policy, target: float, reads: Reads) -> Policy:
        facts = dict(policy.facts) | {
            "target": target,
            "calibrated": reads.sparsity,
            "matrices": {name: round(value, 5) for name, value in reads.by_matrix().items()},
            "windows": list(self.walk.windows.shape),
            "prompt": self.walk.start,
        }
        return replace(policy, facts=facts)

    def gradients(self, index: int) -> dict[str, Tensor] | None:
        """Gradients at the sites of block `index`, from the survey; None unless the method needs them."""
        if "gradient" not in self.method.needs:
            return None
        from safetensors.torch import load_file

        return load_file(self.keep / f"gradient-{index:05d}.safetensors")


def _next_goal(tried: Sequence[tuple[float, float]], target: float) -> float:
    """By the last two goals and what they gave, on a line; by the difference where there is one, or no slope.

    What is zero anyway, as behind a ReLU, makes the slope smaller than one.
    """
    goal, realised = tried[-1]
    slope = 1.0
    if len(tried) > 1:
        before, gave = tried[-2]
        if abs(goal - before) > 1e-6:
            slope = min(max((realised - gave) / (goal - before), 0.2), 2.0)
    return goal + (target - realised) / slope


def _with_error(data: Any, error: Any) -> Any:
    return replace(data, error=error)
