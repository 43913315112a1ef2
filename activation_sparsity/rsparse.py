"""R-Sparse: large inputs meet their columns, all others a low-rank matrix (Zhang et al., ICLR 2025).

    y = W (x * m) + U_r S_r V_r^T (x * (1 - m))        W = U S V^T
    m_j = |x_j| ||W[:, j]||_2 > t                      at rho = 1: |x_j| > t and no residual

A matrix [out, in] with sparsity s keeps a share (1 - s) rho of its channels, C = max(1, floor(in (1 - s) rho)); what is
left of the budget goes to the rank: floor((in out (1 - s) - C out) / (in + out)), at least 1, with the matrix' own
`out` (the authors take the hidden size for key and value, which gives these ranks too much). Thresholds from the dense
model. Every matrix has the model's sparsity; rho is one number (uniform) or one per matrix, found by an evolutionary
search whose settings the paper does not publish; ours are below.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import CoreGuide, LinearPolicy
from .method import BlockData, Evaluate, Extent, Fitted, Log, Method
from .quantiles import Quantiles

UNIFORM = 0.95  # the paper's best single rho
POPULATION = 12
GENERATIONS = 6
PARENTS = 4  # of a population: kept, and the only ones that have children
CHANGED = 0.15  # chance of each rho of a child to be drawn anew
SPREAD = 0.1  # standard deviation of such a draw around the parent's


class RSparse(Method):
    """`rho`: the uniform share, or where the search starts. `search`: evolve one rho per matrix, seeded by `seed`."""

    name = "rsparse"
    needs = frozenset({"inputs"})

    def __init__(
        self,
        *,
        rho: float = UNIFORM,
        search: bool = True,
        seed: int = 0,
        population: int = POPULATION,
        generations: int = GENERATIONS,
    ) -> None:
        self.rho, self.search, self.seed = rho, search, seed
        self.population, self.generations = population, generations

    def fit(self, block: BlockData, budgets: Mapping[str, float], target: float, extent: Extent) -> Fitted:
        """See `Method.fit`."""
        sparsity = min(1.0, target * extent.whole / extent.sites)
        linears: dict[str, LinearPolicy] = {}
        extra: dict[str, Tensor] = {}
        if sparsity <= 0:
            return Fitted()
        for site in block.sites:
            plain = Quantiles(site.x.abs()).values
            for name, weight in site.weights.items():
                norms = weight.norm(dim=0)
                out, width = weight.shape
                most = (
                    int(out * width * (1 - sparsity) / (out + width)) if self.search else self._rank(weight, sparsity)
                )
                left, right = truncated(weight, most)
                own = {
                    "plain": plain, "scores": Quantiles(site.x.abs() * norms).values,
                    "norms": norms, "left": left, "right": right, "sparsity": torch.tensor(sparsity),
                }  # fmt: skip
                linears[name] = entry(own, self.rho)
                extra |= {f"{name}.{part}": tensor for part, tensor in own.items()} if self.search else {}
        return Fitted(linears, extra=extra)

    def _rank(self, weight: Tensor, sparsity: float) -> int:
        return rank_of(weight.shape[0], weight.shape[1], sparsity, self.rho)

    def conclude(self, blocks: Sequence[Fitted], evaluate: Evaluate, log: Log) -> tuple[list[Fitted], CoreGuide | None]:
        """The search, if asked for."""
        if not self.search or not any(block.extra for block in blocks):
            return list(blocks), None
        names = [name for block in blocks for name in block.linears]

        def build(shares: Sequence[float]) -> list[Fitted]:
            by_name = dict(zip(names, shares, strict=True))
            return [
                Fitted(
                    {name: entry(_own(block, name), by_name[name]) for name in block.linears},
                    facts={"rho": {name: by_name[name] for name in block.linears}},
                )
                for block in blocks
            ]

        best = evolve(
            len(names),
            self.rho,
            lambda shares: evaluate(build(shares)),
            self.seed,
            self.population,
            self.generations,
            log,
        )
        return build(best), None


def rank_of(out: int, width: int, sparsity: float, rho: float) -> int:
    """Rank of the residual; 0 at rho = 1."""
    if rho >= 1:
        return 0
    channels = max(1, int(width * (1 - sparsity) * rho))
    return min(out, width, max(1, int((width * out * (1 - sparsity) - channels * out) / (width + out))))


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U_r [out, r], S_r V_r^T [r, in]), float32, from a float64 decomposition."""
    if rank == 0:
        return weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return u[:, :rank].float(), (s[:rank, None] * vt[:rank]).float()


def entry(own: Mapping[str, Tensor], rho: float) -> LinearPolicy:
    """The entry of one matrix for a rho, from what `fit` kept of it."""
    sparsity, norms = float(own["sparsity"]), own["norms"]
    out, width = own["left"].shape[0], len(norms)
    share = 1 - (1 - sparsity) * rho
    table = Quantiles.__new__(Quantiles)
    table.values = own["plain"] if rho >= 1 else own["scores"]
    value = table.at(share)
    if rho >= 1:
        return LinearPolicy(torch.full((width,), value))
    tiny = torch.finfo(torch.float32).tiny
    threshold = torch.where(norms > 0, value / norms.clamp_min(tiny), torch.inf)
    rank = min(rank_of(out, width, sparsity, rho), own["left"].shape[1])
    if rank == 0:
        return LinearPolicy(threshold)
    return LinearPolicy(threshold, left=own["left"][:, :rank].contiguous(), right=own["right"][:rank].contiguous())


def evolve(
    genes: int,
    start: float,
    fitness: object,
    seed: int,
    population: int = POPULATION,
    generations: int = GENERATIONS,
    log: Log = lambda _: None,
) -> list[float]:
    """The genes in [0, 1] with the least fitness: elitist, one parent per child, gaussian mutation, seeded.

    The first generation holds all ones, all `start`, and mutations of these.
    """
    draw = random.Random(seed)
    assert callable(fitness)
    known: dict[tuple[float, ...], float] = {}

    def score(member: list[float]) -> float:
        key = tuple(member)
        if key not in known:
            known[key] = float(fitness(member))
        return known[key]

    def child(parent: list[float]) -> list[float]:
        return [
            min(1.0, max(0.0, round(draw.gauss(gene, SPREAD), 3))) if draw.random() < CHANGED else gene
            for gene in parent
        ]

    members = [[1.0] * genes, [start] * genes]
    members += [child(members[k % 2]) for k in range(max(0, population - 2))]
    for generation in range(generations):
        members = sorted(members, key=score)[:PARENTS]
        log(f"generation {generation + 1} of {generations}: loss {score(members[0]):.4f}")
        members += [child(draw.choice(members[:PARENTS])) for _ in range(max(0, population - PARENTS))]
    return min(members, key=score)


def _own(block: Fitted, name: str) -> dict[str, Tensor]:
    parts = ("plain", "scores", "norms", "left", "right", "sparsity")
    return {part: block.extra[f"{name}.{part}"] for part in parts}
