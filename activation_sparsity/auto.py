"""Gossamer's own policy: weight-aware thresholds around centres, constants in the bias, budgets by their cost.

For a site with input x and matrices W_p, and a share s of its channels to skip:

    m_j = |x_j - c_j| b_j^a > t          b_j: how much channel j matters; a in {0, 1/2, 1}; t the s-quantile
    c_j = E[x_j | dropped]               so that what is dropped has mean zero; W_p c goes into the bias
    y_p = W_p ((x - c) m) + W_p c + b    + a low-rank map of the rest where a rank saves more error than its bytes cost

b and the exponent are taken per site by the error on tokens that were not fitted on. Everything is measured on the
activations of the model as sparse as it is below (`follows`), at sparse positions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .base import LinearPolicy
from .curve import GRID, Curve, equal_error, least_total, rising
from .lowrank import with_residual
from .method import BlockData, Evaluate, Extent, Fitted, Log, Method, Site, column_norms
from .quantiles import counted_rows, quantile
from .refine import HIGHEST, balanced, grouped, refine

EXPONENTS = (0.0, 0.5, 1.0)
ROUNDS = 3  # of centres and masks in turns
PROBE = 512  # tokens that errors are measured on
PROBED = 1 << 19  # entries of them: of wide sites fewer tokens
FITTED = 1 << 22  # entries that thresholds and centres are taken from
PAYS = 0.98  # of the block's error: a residual that leaves more is not worth its two further products
SINK = 20.0  # times the median norm: such tokens are not calibrated on


@dataclass(frozen=True)
class Options:
    """Parts of the method, each of which can be left out."""

    centers: bool = True
    exponents: tuple[float, ...] = EXPONENTS
    gradient: bool = True
    allocation: str = "search"
    groups: int = 40
    rounds: int = 3
    residual: bool = True
    follows: bool = True


class Auto(Method):
    """See the module."""

    name = "auto"
    surveys = True

    def __init__(self, options: Options | None = None, *, search: bool = True) -> None:
        """`search` False: no refinement by the loss of the whole model."""
        self.options = options or Options(allocation="search" if search else "even")
        self._tables: dict[str, list[Mapping[str, LinearPolicy]]] = {}  # by site, for every share of the grid
        self._plain: set[str] = set()  # sites where a residual did not pay: it is not tried again
        self.follows = self.options.follows
        needs = {"inputs": True, "gradient": self.options.gradient, "error": self.options.residual}
        self.needs = frozenset(name for name, wanted in needs.items() if wanted)

    def survey(self, block: BlockData) -> dict[str, Curve]:
        """See `Method.survey`."""
        return {site.leader: self._curve(_without_sinks(site)) for site in block.sites}

    def _curve(self, site: Sample) -> Curve:
        probe = _probe(site)
        found = [self._entries(probe, probe, share) for share in GRID[1:]]
        self._tables[site.leader] = [{}, *(choice.entries for choice in found)]
        errors = rising([0.0, *(self._error(probe, choice.split) for choice in found)])
        return Curve(GRID, errors, site.size, float((site.x == 0).float().mean()))

    def share(
        self, curves: Mapping[str, Curve], target: float, extent: Extent, evaluate: Evaluate, log: Log
    ) -> dict[str, float]:
        """The best of a few starts, refined by the loss of the whole model. See `Method.share`."""
        self._plain.clear()
        weights = target * extent.whole
        sizes = {name: curve.size for name, curve in curves.items()}
        floors = {name: min(curve.free, HIGHEST) for name, curve in curves.items() if curve.free > 0}
        even = dict.fromkeys(curves, weights / extent.sites)
        starts = {"even": even, "equal": equal_error(curves, weights)[0], "total": least_total(curves, weights)}
        starts["between"] = {name: (even[name] + starts["total"][name]) / 2 for name in curves}
        starts = {kind: balanced(shares, sizes, weights, floors) for kind, shares in starts.items()}
        if self.options.allocation in starts:
            return starts[self.options.allocation]
        order = sorted(curves, key=_natural)

        def loss(shares: Mapping[str, float], base: bool = False) -> float:
            return evaluate([Fitted(self._nearest(shares))], base=base)

        best = min(starts.values(), key=loss)
        return refine(best, sizes, grouped(order, self.options.groups), loss, self.options.rounds, log, floors)

    def _nearest(self, shares: Mapping[str, float]) -> dict[str, LinearPolicy]:
        """Entries of the survey, for the nearest share of its grid."""
        found: dict[str, LinearPolicy] = {}
        for name, share in shares.items():
            k = min(range(len(GRID)), key=lambda k: abs(GRID[k] - share))
            found |= self._tables[name][k]
        return found

    def fit(self, block: BlockData, budgets: Mapping[str, float], target: float, extent: Extent) -> Fitted:
        """See `Method.fit`."""
        linears: dict[str, LinearPolicy] = {}
        facts = {}
        for whole in block.sites:
            share = budgets[whole.leader]
            if share <= 0:
                continue
            site = _every(_without_sinks(whole), 1, FITTED)
            probe = _probe(site)
            found = self._entries(site, probe, share)
            assert found is not None
            if self.options.residual and whole.leader not in self._plain:
                found = self._with_residual(site, share, found, linears, block)
            linears |= found.entries
            facts[whole.leader] = {"share": share, "exponent": found.split.exponent, "rank": found.rank}
        fitted = Fitted(linears, facts={"sites": facts})
        self.restored(block.index, fitted)
        return fitted

    def restored(self, index: int, fitted: Fitted) -> None:
        """See `Method.restored`."""
        self._plain |= {leader for leader, fact in fitted.facts.get("sites", {}).items() if fact["rank"] == 0}

    def _with_residual(
        self, site: Sample, share: float, found: Choice, others: Mapping[str, LinearPolicy], block: BlockData
    ) -> Choice:
        """With a residual of the same cost, if the block's output under it and `others` is nearer to the dense one.

        A residual that lowers the error of its own site too little for that is not tried.
        """

        def make(share: float) -> Mapping[str, LinearPolicy]:
            return self._made(site, self._split(site, share, found.split.exponent)).entries

        entries, rank = with_residual(site.x, site.weights, make, share, found.entries, PAYS)
        if rank == 0 or block.error is None:
            return found
        before = block.error({**others, **found.entries}, {})
        after = block.error({**others, **entries}, {})
        return Choice(entries, found.split, rank) if after < PAYS * before else found

    def _entries(self, site: Sample, probe: Sample, share: float) -> Choice:
        """Entries for a share: the exponent is the best one on the probe, the thresholds are those of the site."""
        tried = [self._split(probe, share, exponent) for exponent in self.options.exponents]
        best = min(tried, key=lambda made: self._error(probe, made))
        return self._made(site, best if probe is site else self._split(site, share, best.exponent))

    def _split(self, site: Sample, share: float, exponent: float) -> Split:
        begin = site.middle if self.options.centers else torch.zeros(site.width)
        rounds = ROUNDS if self.options.centers else 0
        return Split(*split(site.x, site.importance**exponent, share, begin, rounds), exponent)

    def _made(self, site: Sample, made: Split) -> Choice:
        entries = {}
        for name, weight in site.weights.items():
            centered = (made.center, weight @ made.center) if self.options.centers else (None, None)
            entries[name] = LinearPolicy(made.threshold, *centered)
        return Choice(entries, made)

    def _error(self, site: Sample, made: Split) -> float:
        """Of what is dropped: the loss it costs to second order, or the squared output error over the output."""
        dropped = _dropped(site.x, made)
        if site.gradient is not None:
            return float((dropped * site.gradient).sum(1).square().mean())
        total = 0.0
        for weight in site.weights.values():
            total += float((dropped @ weight.T).square().sum() / (site.x @ weight.T).square().sum().clamp_min(1e-30))
        return total / len(site.weights)


@dataclass(frozen=True, eq=False)
class Sample(Site):
    """A site's tokens, and what is known of its channels."""

    @cached_property
    def importance(self) -> Tensor:
        """float32 [in]: how much a channel matters, by the loss or by its weights."""
        if self.gradient is None:
            return column_norms(self.weights)
        norms = self.gradient.square().mean(0).sqrt()
        return norms.clamp_min(1e-3 * float(norms.mean()))

    @cached_property
    def middle(self) -> Tensor:
        """float32 [in]: medians, where centres begin."""
        return self.x[:: max(1, len(self.x) // PROBE)].median(0).values

    def taken(self, rows: slice | Tensor) -> Sample:
        """Some of the tokens."""
        return Sample(self.weights, self.x[rows], None if self.gradient is None else self.gradient[rows])


@dataclass(frozen=True)
class Split:
    """What a site drops: |x - center| <= threshold, float32 [in] each, and the exponent it was made with."""

    threshold: Tensor
    center: Tensor
    exponent: float


@dataclass(frozen=True)
class Choice:
    """Entries of a site's matrices, what they were made from, and the rank of their residuals."""

    entries: Mapping[str, LinearPolicy]
    split: Split
    rank: int = 0


def split(x: Tensor, scale: Tensor, share: float, center: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """(threshold [in], center [in]): |x - center| scale <= t drops `share` of all entries.

    The centre begins as `center` and is the mean of what is dropped, `rounds` times.
    """
    few, smallest = counted_rows(x), torch.finfo(torch.float32).tiny

    def threshold(middle: Tensor) -> Tensor:
        scores = (few - middle).abs_().mul_(scale)
        return quantile(scores, share) / scale.clamp_min(smallest)

    for _ in range(rounds):
        drop = ((x - center).abs_() <= threshold(center)).float()
        count = drop.sum(0)
        center = torch.where(count > 0, drop.mul_(x).sum(0) / count.clamp_min(1), center)
    return threshold(center), center


def _dropped(x: Tensor, made: Split) -> Tensor:
    moved = x - made.center
    return moved.masked_fill_(~(moved.abs() <= made.threshold), 0.0)


def _every(site: Sample, step: int, entries: int) -> Sample:
    """Every so many tokens of a site: at least `step`, and so that no more than about `entries` entries are left."""
    step = max(step, -(-site.x.numel() // entries))
    return site if step == 1 else site.taken(slice(None, None, step))


def _probe(site: Sample) -> Sample:
    return _every(site, max(1, len(site.x) // PROBE), PROBED)


def _without_sinks(site: Site) -> Sample:
    sample = Sample(site.weights, site.x, site.gradient)
    norms = site.x.norm(dim=1)
    keep = norms <= SINK * norms.median()
    return sample if bool(keep.all()) else sample.taken(keep)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
