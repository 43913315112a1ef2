"""CoreInfer: an MLP computes the neurons that matter to the sequence, chosen once from its prompt (Wang et al. 2024).

Beside the authors' code: neurons are ranked by |h_i| ||W_down[:, i]||, which is right for gated MLPs, too, whose h has
both signs; every layer takes part, with the share that the budget says; a sequence has a set of its own. `cores.py`
chooses at run time. Guided by similarity, the signatures of the calibration windows' prompts at one layer are
clustered by k-means (scikit-learn), and each cluster has its own neurons in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import DataError, ModelError
from .base import CoreGuide, CoreNeurons
from .cores import top, vote
from .method import BlockData, Evaluate, Extent, Fitted, Log, Method

ALPHA = 0.4  # the paper's share of a token's neurons
DEPTH = 0.78  # where signatures are taken: layer 25 of 32 in the paper
MOST = 10  # clusters that are tried
LEAST = 4


class CoreInfer(Method):
    """`mode`: "stability" (long prompts) or "similarity" (short ones). `alpha`: share of a token's neurons that vote.

    `keep`: the share of neurons (the paper's beta) in place of a target. `refresh`: decode tokens between two looks at
    drift, 0 for none. `layers`: the first and the last of the model's `blocks` that skip; None: all.

    Sparsity is that of tokens that skip: with a refresh, a share of them, `watched`, does not.
    """

    name = "coreinfer"

    def __init__(
        self,
        *,
        mode: str = "stability",
        alpha: float = ALPHA,
        keep: float | None = None,
        refresh: int = 0,
        drift: float = 0.5,
        seed: int = 0,
        layers: tuple[int, int] | None = None,
        blocks: int = 0,
    ) -> None:
        self.mode, self.alpha, self.keep, self.refresh, self.drift, self.seed = mode, alpha, keep, refresh, drift, seed
        self.layers = layers
        self._part = 1.0 if layers is None else (layers[1] + 1 - layers[0]) / blocks  # blocks are taken to be alike
        self.needs = frozenset({"prompts"}) if mode == "similarity" else frozenset()

    def reachable(self, extent: Extent) -> float:
        """See `Method.reachable`."""
        return self._part * (extent.gates + extent.others) / extent.whole if extent.whole else 0.0

    @property
    def watched(self) -> float:
        """Share of the decoded tokens that compute all neurons, to see what has drifted (`Sequences.step`)."""
        return max(1, self.refresh // 4) / self.refresh if self.refresh else 0.0

    def fit(self, block: BlockData, budgets: Mapping[str, float], target: float, extent: Extent) -> Fitted:
        """See `Method.fit`. ModelError for a model without MLPs."""
        if not extent.gates + extent.others:
            raise ModelError(
                "coreinfer found no MLP of the form down(act(up x)) or down(act(gate x) * up x) in this model",
                hint="use --activation auto",
            )
        if self.layers is not None and not self.layers[0] <= block.index <= self.layers[1]:
            return Fitted()
        share = self.keep if self.keep is not None else 1 - target / self.reachable(extent)
        mlps, extra = {}, {}
        for path, parts in block.mlps.items():
            keep = max(1, round(share * parts.neurons))
            mlps[path] = CoreNeurons(parts, keep, block.norms[path])
            found = [vote(inner, block.norms[path], self.alpha) for inner in block.prompts.get(path, ())]
            if found:
                extra[f"{path}.votes"] = torch.stack([votes for votes, _ in found])
                extra[f"{path}.importance"] = torch.stack([importance for _, importance in found])
        return Fitted(mlps=mlps, extra=extra)

    def conclude(self, blocks: Sequence[Fitted], evaluate: Evaluate, log: Log) -> tuple[list[Fitted], CoreGuide | None]:
        """The guide; with similarity, the clusters."""
        if self.mode == "stability":
            return list(blocks), CoreGuide(self.alpha, refresh=self.refresh, drift=self.drift)
        paths = [path for block in blocks for path in block.mlps]
        signature = paths[min(len(paths) - 1, int(DEPTH * len(paths)))]
        block = next(block for block in blocks if signature in block.mlps)
        entry = block.mlps[signature]
        assert isinstance(entry, CoreNeurons)
        signatures = torch.zeros(len(block.extra[f"{signature}.votes"]), entry.parts.neurons)
        for row, votes, importance in zip(
            signatures, block.extra[f"{signature}.votes"], block.extra[f"{signature}.importance"], strict=True
        ):
            row[top(votes, importance, entry.keep).long()] = 1.0
        labels, centroids = clustered(signatures, self.seed)
        log(f"{len(centroids)} clusters of {len(labels)} prompts")
        guide = CoreGuide(self.alpha, signature, entry.keep, centroids, self.refresh, self.drift)
        return [self._with_clusters(block, labels, len(centroids)) for block in blocks], guide

    def _with_clusters(self, block: Fitted, labels: Tensor, clusters: int) -> Fitted:
        mlps = {}
        for path, entry in block.mlps.items():
            assert isinstance(entry, CoreNeurons)
            votes, importance = block.extra[f"{path}.votes"], block.extra[f"{path}.importance"]
            own = [top(votes[labels == k].sum(0), importance[labels == k].sum(0), entry.keep) for k in range(clusters)]
            mlps[path] = CoreNeurons(entry.parts, entry.keep, entry.norms, torch.stack(own))
        return Fitted(block.linears, mlps, block.facts)


def clustered(signatures: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(cluster of every row, centroids [k, neurons]); k by the elbow of the inertia, within LEAST and MOST."""
    from sklearn.cluster import KMeans

    if len(signatures) < 2:
        raise DataError(
            f"{len(signatures)} prompts cannot be clustered", hint="use more calibration windows (--nsamples)"
        )
    points = signatures.numpy()
    highest = min(MOST, len(points))
    fits = [KMeans(k, random_state=seed, n_init=4).fit(points) for k in range(1, highest + 1)]
    inertia = torch.tensor([fit.inertia_ for fit in fits])
    bends = inertia[:-2] - 2 * inertia[1:-1] + inertia[2:]
    count = int(bends.argmax()) + 2 if len(bends) else highest
    fit = fits[min(max(count, LEAST), highest) - 1]
    return torch.from_numpy(fit.labels_).long(), torch.from_numpy(fit.cluster_centers_).float()
